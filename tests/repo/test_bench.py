"""The benchmarks time only what is right, and the pages' figures are those of the JSON."""

import importlib
import json
import subprocess
import sys

import pytest
import torch

from paths import BENCH

README = """Top.
<!-- demo: written by a test -->
<!-- /demo -->
Middle.
<!-- speed: written by a test -->
<!-- /speed -->
End.
"""
SPEED = """Start.
<!-- benchmarks: written by a test -->
<!-- /benchmarks -->
Rest.
"""
SUMMARY = {
    "torch": "2.0",
    "device": "cpu",
    "epochs": 3,
    "seed": 7,
    "train": {"elbo": -40.0, "reconstruction": 34.0, "kl": 6.0, "kl_of_mean": 1.5, "gap": 4.5},
}
PNG = b"\x89PNG\r\n"


@pytest.fixture
def bench(monkeypatch):
    """Import a file of bench/ by name."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def plain(mu, logvar, both, *, half=0.5, eps=None, detach=False, power=0.5, mean=(0,)):
    """The plain code, with places to break it."""
    z = mu + torch.exp(power * logvar) * (torch.randn_like(mu) if eps is None else eps)

    def terms(m, v):
        return half * (m.pow(2) + v.exp() - 1 - v)

    kl = terms(mu.detach() if detach else mu, logvar)
    kl_of_mean = terms(mu.mean(mean), logvar.mean(mean)).sum()
    return z, kl.flatten(1).sum(1).mean(), kl_of_mean if both else None


WRONG = {
    "no half in the KL": dict(half=1.0),
    "variance for standard deviation": dict(power=1.0),
    "part of the gradient missing": dict(detach=True),
    "mean over all axes": dict(mean=(0, 1)),
    "no noise": dict(eps=0.0),
    "the same noise twice": dict(eps=torch.randn(128, 20, generator=torch.Generator())),
}


def _fault(bench, function, both=True, dtype=torch.float32, shape=(128, 20)):
    torch.manual_seed(0)
    providers, cases = bench("providers"), bench("cases")
    mu, logvar = cases.Case(shape, dtype).inputs("cpu")
    provider = providers.Provider("a", lambda: function)
    return bench("correctness").fault(
        providers.Step(provider, provider.build(), mu, logvar, both, dkl=float(shape[0]))
    )


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_provider_is_found(bench, name):
    assert _fault(bench, lambda mu, logvar, both: plain(mu, logvar, both, **WRONG[name]))


def test_one_noise_for_all_samples_is_found(bench):
    def shared(mu, logvar, both):
        return plain(mu, logvar, both, eps=torch.randn_like(mu[:1]).expand_as(mu))

    assert "neighbour" in _fault(bench, shared)


def test_noise_that_is_not_normal_is_found(bench):
    def uniform(mu, logvar, both):
        return plain(mu, logvar, both, eps=(torch.rand_like(mu) - 0.5) * 12**0.5)

    assert "mean size" in _fault(bench, uniform, shape=(256, 64))


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "distributions", "vaekl-eager"])
def test_right_providers_pass(bench, name, dtype, both):
    (provider,) = (p for p in bench("providers").PROVIDERS if p.name == name)
    assert _fault(bench, provider.build(), both, dtype) is None


def _run(*arguments, status=0):
    """A script of bench/; its output."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCH)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_run_writes_results_and_plots_and_report_takes_them(tmp_path):
    results = tmp_path / "results"
    options = ["--device", "cpu", "--quick", "--cases", "128x20 fp32", "--out", results]
    printed = _run("run.py", *options, "--providers", "plain", "vaekl-eager")
    assert "128x20 fp32" in printed
    data = json.loads((results / "cpu.json").read_text())
    assert data["copy_bytes_per_second"] > 0
    assert data["wrong"] == []
    assert {"plain", "vaekl-eager"} == {row["provider"] for row in data["rows"]}
    assert all(row["seconds"] > 0 for row in data["rows"])
    assert (results / "cpu-speedup.png").read_bytes().startswith(PNG)
    assert data["device"]["versions"]["torch"] == torch.__version__

    call = {"name": "a call", "forward_us": 12.3, "forward_backward_us": 45.6, "plain_operators": 9}
    host = {"machine": "M", "versions": {"torch": "2"}, "operator_us": 1.0, "rows": [call]}
    (results / "host.json").write_text(json.dumps(host))
    _run("imports.py", "--runs", "1", "--out", results / "imports.json")
    row = {
        "kernel": "forward",
        "target": "sm_90",
        "registers": 52,
        "instructions_per_element": 55.5,
    }
    rows = [
        {**row, "variant": f"fp32 {shape} kl=batchmean of_mean=batch z"}
        for shape in ("many", "one")
    ]
    rows += [{**each, "kernel": "backward"} for each in rows]
    (results / "codegen.json").write_text(json.dumps({"rows": rows}))
    readme, speed, summary = (tmp_path / n for n in ("README.md", "speed.md", "summary.json"))
    readme.write_text(README)
    speed.write_text(SPEED)
    summary.write_text(json.dumps(SUMMARY))
    report = ["report.py", "--readme", readme, "--speed", speed, "--summary", summary]
    report += ["--results", results]
    printed = _run(*report, "--check", status=1)
    for name in ("demo", "speed", "benchmarks"):
        assert f"'{name}'" in printed
    _run(*report)
    _run(*report, "--check")
    text = readme.read_text()
    for part in ("Top.", "4.500 nats", "75%", "Middle.", "Not yet measured on a GPU.",
                 "| 128x20 fp32 |", "End."):  # fmt: skip
        assert part in text, part
    assert "vaekl-eager" not in text
    for part in ("Start.", "Not yet measured on a GPU.", "| 128x20 fp32 |",
                 "| a call | 12.3 | 45.6 | 9 |", "`import vaekl` after `import torch` takes ",
                 "| forward fp32 | 52 registers, 55.5 |",
                 "| H100 SXM, sm_90 | 132 | 924 | 1188 | 1188 |",
                 "results/cpu-speedup.png", "Rest."):  # fmt: skip
        assert part in speed.read_text(), part
    readme.write_text(text.replace("4.500 nats", "4.501 nats"))
    printed = _run(*report, "--check", status=1)
    assert "'demo'" in printed
    assert "'speed'" not in printed
    assert "'benchmarks'" not in printed
    _run(*report)
    speed.write_text(speed.read_text().replace("12.3", "12.4"))
    assert "'benchmarks'" in _run(*report, "--check", status=1)


def test_a_table_without_rich_lines_up(bench):
    rows = [["a", "10.5"], None, ["longer", "2"]]
    assert bench("screen").plain_lines("Title", ["name", "\nms"], rows, 1, "caption") == [
        "Title",
        "name      ms",
        "------  ----",
        "a       10.5",
        "------  ----",
        "longer     2",
        "caption",
    ]


def test_the_cpu_backend_in_detail(bench, tmp_path):
    _run("cpu.py", "--quick", "--out", tmp_path / "cpu-detail.json")
    data = json.loads((tmp_path / "cpu-detail.json").read_text())
    text = bench("tables").cpu_detail(data)
    for part in ("| forward: z and both KLs |", "| 64x10 |", "| 1e5 |", "x at 16384",
                 "backward with compiled code on disk"):  # fmt: skip
        assert part in text, part


def test_run_stops_at_its_time_limit_on_a_machine_with_little_installed(tmp_path):
    """Neither rich nor matplotlib: a table of plain lines, and no plots."""
    bare = "import runpy, sys; sys.modules.update(rich=None, matplotlib=None); del sys.argv[0]; "
    bare += "sys.path[0] = '.'; runpy.run_path(sys.argv[0], run_name='__main__')"
    options = ["--device", "cpu", "--seconds", "0", "--out", tmp_path]
    printed = _run("-c", bare, "run.py", *options)
    assert "case  KLs  provider  forward ms" in printed
    assert "no plots" in printed
    assert "stopped at the time limit" in printed
    data = json.loads((tmp_path / "cpu.json").read_text())
    assert not data["complete"]
    assert data["rows"] == []


def test_report_reads_gpu_results(bench, tmp_path):
    """Written by hand in the form that run.py gives them, with no figure that could be shown."""
    device = {"kind": "cuda", "name": "A GPU", "driver": "1", "threads": 1, "versions": {},
              "commit": None, "date": "never"}  # fmt: skip
    rows = [
        {"case": "c", "both": True, "mode": mode, "provider": provider, "seconds": 1.0,
         "device_seconds": 1.0, "graph_seconds": None, "launches": count, "floor_bytes": 50,
         "peak_bytes": 2**20, "saved_bytes": 2**20}
        for mode, count in (("forward", 1), ("forward+backward", 2))
        for provider in ("plain", "vaekl-triton")
    ]  # fmt: skip
    wrong = [{"provider": "compile", "case": "c", "both": True, "problem": "p"}]
    data = {"device": device, "copy_bytes_per_second": 100.0, "complete": False,
            "wrong": wrong, "rows": rows}  # fmt: skip
    (tmp_path / "a-gpu.json").write_text(json.dumps(data))
    step = {"what": "A model.", "plain": 2e-3, "vaekl": 1e-3, "plain_graph": 3e-3,
            "vaekl_graph": 1e-3}  # fmt: skip
    slow = {**step, "what": "One that waits.", "plain_graph": None}
    device["versions"] = {"torch": "2"}
    (tmp_path / "training-gpu.json").write_text(
        json.dumps({"device": device, "rows": [step, slow]})
    )
    report = bench("report")
    results = report.load(tmp_path, tmp_path / "README.md")
    text = report.benchmarks(results)
    assert "Not yet measured" not in text + report.speed(results)
    assert "| c, vaekl-triton | 1 + 1 | 50% | 50% |  | 1.00 | 1.00 |" in text
    assert "results were wrong: compile (c)" in text
    assert "| A model | 2.00 | 1.00 | 2.00x | 3.00 | 1.00 | 3.00x |" in text
    assert "| One that waits | 2.00 | 1.00 | 2.00x |  | 1.00 |  |" in text
    assert "Whole training steps on A GPU: 2.00x to 2.00x." in report.speed(results)


def test_training_steps_are_measured(tmp_path):
    """Of models whose KLs it has compared."""
    printed = _run("training.py", "--seconds", "0.1", "--out", tmp_path / "training.json")
    data = json.loads((tmp_path / "training.json").read_text())
    assert data["device"]["kind"] in ("cpu", "cuda")
    for row in data["rows"]:
        assert row["what"][:20] in printed
        assert row["plain"] > 0
        assert row["vaekl"] > 0


def test_what_a_prior_costs_is_measured(bench, tmp_path):
    _run("priors.py", "--seconds", "0.1", "--out", tmp_path / "priors.json")
    data = json.loads((tmp_path / "priors.json").read_text())
    page = bench("sections").priors(data)
    assert [row["shape"] for row in data["rows"]] == [[128, 20], [1024, 512]]
    for row in data["rows"]:
        assert all(seconds > 0 for seconds in row["seconds"].values())
        assert f"| {'x'.join(map(str, row['shape']))} |" in page


def test_report_needs_a_place_for_what_there_is(bench):
    text, changed, missing = bench("report").rewritten("no markers", {"demo": "x", "other": None})
    assert (text, changed, missing) == ("no markers", [], ["demo"])


def test_bits_that_changed_are_seen(bench, tmp_path, monkeypatch, capsys):
    threads, file = torch.get_num_threads(), tmp_path / "before.json"
    bits = bench("bits")

    def run(action):
        monkeypatch.setattr(sys, "argv", ["bits.py", action, str(file), "--calls", "60"])
        return bits.main(), capsys.readouterr().out

    try:
        assert run("save")[0] == 0
        assert run("compare") == (0, "0 of 60 calls differ\n")
        before = json.loads(file.read_text())
        before["calls"][7]["gave"][0] = "another"
        file.write_text(json.dumps(before))
        code, told = run("compare")
        assert code == 1
        assert "call 7: " in told
        assert "another  ->  " in told
        assert "1 of 60 calls differ" in told
    finally:
        torch.set_num_threads(threads)


def test_numerics_are_what_the_formulas_give_here(bench):
    """The committed figures do not depend on the machine, but for rounding of exp."""
    committed = json.loads((BENCH / "results" / "numerics.json").read_text())["rows"]
    for row, found in zip(committed, bench("numerics").measure(), strict=True):
        assert found["exact"] == pytest.approx(row["exact"])
        assert row["found"].keys() == found["found"].keys()
        for figures in (row["found"], found["found"]):
            assert figures["vaekl"] == pytest.approx(row["exact"], rel=5e-7)
            if row["delta"] == 1e-4:  # all others are off
                off = [abs(value / row["exact"] - 1) for value in figures.values()]
                assert min(off[:-1]) > 1e-4
