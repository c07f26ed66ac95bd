"""vaekl check: it passes what is right, finds what is wrong, and says both plainly."""

import json
import subprocess
import sys

import pytest
import torch

import vaekl
from vaekl import _check, _plans, _validate, backends
from vaekl.__main__ import main
from vaekl.diagnostics import statistics


@pytest.fixture
def quick(monkeypatch):
    """One small case, one small timing."""
    monkeypatch.setattr(_check, "CASES", (_check.Case((7, 6)),))
    monkeypatch.setattr(_check, "LARGE_CASES", ())
    monkeypatch.setattr(_check, "SPEED_SHAPE", (8, 4))


@pytest.fixture
def break_output(monkeypatch):
    """Make one output of a backend's forward or backward wrong by a hundred-thousandth."""

    def break_it(backend, field, of, factor=1 + 1e-5):
        module = backends.get(backend)
        plan = getattr(module, of)

        def wrong_plan(*arguments):
            right = plan(*arguments)

            def wrong(*arguments):
                results = right(*arguments)
                found = results[0] if of == "forward" else results
                broken = found._replace(**{field: getattr(found, field) * factor})
                return (broken, results[1]) if of == "forward" else broken

            return wrong

        monkeypatch.setattr(module, of, wrong_plan)
        _plans.forget()

    yield break_it
    _plans.forget()


@pytest.mark.parametrize("case", _check.CASES, ids=str)
def test_every_case_passes(case, backend, device):
    result = _check.check_case(case, backend, device)
    assert result.problem is None
    assert set(result.errors.values()) != {0.0}
    assert max(result.errors.values()) <= 1
    assert 0 <= result.kl_error <= 5e-7


def test_large_cases_pass(device):
    for case in _check.LARGE_CASES:
        assert (
            _check.check_case(case, "cpu" if device == "cpu" else "triton", device).problem is None
        )


@pytest.mark.parametrize(
    ("of", "field", "name"),
    [
        ("forward", "z", "z"),
        ("forward", "kl", "kl"),
        ("forward", "kl_of_mean", "kl_of_mean"),
        ("backward", "mu", "dmu"),
        ("backward", "scale", "dlogvar"),
    ],
)
def test_a_wrong_output_is_found(of, field, name, backend, device, break_output):
    break_output(backend, field, of)
    result = _check.check_case(_check.CASES[0], backend, device)
    over = {output for output, error in result.errors.items() if error > 1}
    assert over == {name}
    assert f"{name} by " in result.problem


def test_wrong_statistics_are_found(backend, device, monkeypatch):
    right = statistics.collect

    def wrong(*arguments):
        found = right(*arguments)
        return found._replace(mean_phi=found.mean_phi * (1 + 1e-9))

    monkeypatch.setattr("vaekl.diagnostics.collect", wrong)
    assert "diagnose kl_dims" in _check.check_case(_check.CASES[0], backend, device).problem


def test_status_is_1_if_a_backend_is_wrong(quick, break_output, capsys):
    assert main(["check"]) == 0
    assert capsys.readouterr().out.endswith("all backends that can run here are right\n")
    break_output("eager", "kl", "forward")
    assert main(["check"]) == 1
    printed = capsys.readouterr().out
    assert printed.endswith("wrong: eager\n")
    assert "eager      wrong" in printed
    assert "error above what is allowed: kl by " in printed
    assert main(["check", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert not data["ok"]
    assert [b["name"] for b in data["backends"] if b["status"] == "wrong"] == ["eager"]


def test_a_backend_that_raises_is_wrong(quick, monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("vaekl.backends.eager.forward", fail)
    _plans.forget()
    assert main(["check"]) == 1
    assert "RuntimeError: no such instruction" in capsys.readouterr().out


def test_not_a_number_is_wrong_and_json(quick, break_output, capsys):
    break_output("eager", "z", "forward", torch.nan)
    assert main(["check", "--json"]) == 1
    text = capsys.readouterr().out
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (eager,) = (b for b in data["backends"] if b["name"] == "eager")
    assert eager["cases"][0]["errors"]["z"] == "inf"


def test_what_is_printed(quick, capsys):
    assert main(["check"]) == 0
    out, err = capsys.readouterr()
    for name in ("python", "vaekl", "torch", "triton", "numba", "numpy"):
        assert f"\n  {name} " in out
    assert torch.__version__ in out
    for name in ("triton", "cpu", "eager"):
        assert f"\n  {name:<10} " in out
        if name != "cpu" or not torch.cuda.is_available():
            assert f"checking {name}: [7, 6] float32" in err  # no terminal: a line for each step
    assert len(err.splitlines()) == _check.steps()
    assert " ms\n" in out


def test_json(quick, capsys):
    assert main(["check", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ok"]
    assert data["versions"]["vaekl"] == vaekl.__version__
    assert data["devices"][0]["device"] == "cpu"
    assert [b["name"] for b in data["backends"]] == ["triton", "cpu", "eager"]
    for b in data["backends"]:
        assert b["status"] == "ok"
        assert 0 < b["worst_share_of_allowed_error"] <= 1
        assert (b["milliseconds"] is None) == b["interpreted"]


def test_what_cannot_run_says_why(quick, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_validate, "_interpreting", lambda: False)
    monkeypatch.setitem(sys.modules, "numba", None)  # not installed
    backends.forget()
    assert main(["check"]) == 0
    printed = capsys.readouterr().out
    assert "triton     not available: no CUDA or ROCm device that torch can use" in printed
    assert "cpu        not available: needs numba: pip install 'vaekl[cpu]'" in printed
    assert "eager      ok" in printed
    monkeypatch.undo()
    backends.forget()


def test_progress_bar_on_a_terminal(quick, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["check"]) == 0
    assert "checking" not in capsys.readouterr().err


def test_as_a_module():
    command = [sys.executable, "-W", "error", "-m", "vaekl", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "check" in done.stdout
    assert "status 1" in done.stdout


def test_the_command_line(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        return stop.value.code, capsys.readouterr()

    code, (out, _) = run("check", "--help")
    assert code == 0
    assert "--json" in out
    assert run("--version")[1].out == f"vaekl {vaekl.__version__}\n"
    for wrong in (("--nothing",), ("check", "--nothing"), ("chekc",)):
        code, (_, err) = run(*wrong)
        assert code == 2
        assert err.startswith("usage: vaekl")
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: vaekl")


def test_a_timing_that_fails_is_reported(monkeypatch, quick, capsys):
    def broken(backend, device):
        raise RuntimeError("no time")

    monkeypatch.setattr(_check, "seconds", broken)
    assert main(["check", "--json"]) == 1
    eager = json.loads(capsys.readouterr().out)["backends"][-1]
    assert eager["status"] == "wrong"
    assert eager["cases"][-1]["problem"] == "RuntimeError: no time"
