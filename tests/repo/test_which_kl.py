"""The trainings of docs/which-kl.md, in a short setting, and the committed ones."""

import json
import os
import runpy
import subprocess
import sys

import pytest

from paths import DOCS, EXAMPLES

SCRIPT = EXAMPLES / "which_kl.py"
FIGURES = {"kl.png", "latent.png", "samples.png", "report-kl-of-mean.png", "report-mean-of-kls.png"}


def run(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "error", SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_few_epochs(tmp_path):
    done = run("--epochs", "8", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.glob("*.png")} == FIGURES
    summary = json.loads((tmp_path / "summary.json").read_text())
    right, wrong = (summary["results"][k] for k in ("mean of the KLs", "KL of the mean"))
    for result in (right, wrong):
        report = result["report"]
        assert report["kl"] == pytest.approx(result["kl"], rel=1e-5)
        assert report["kl_of_mean"] == pytest.approx(result["kl_of_mean"], rel=1e-4)
        both = report["aggregate_kl"] + report["information"]
        assert report["kl"] == pytest.approx(both, rel=1e-12)
        assert result["elbo"] == pytest.approx(-result["reconstruction"] - result["kl"], rel=1e-6)
    # Each training lowers its own.
    assert wrong["kl"] > 3 * right["kl"]
    assert right["kl_of_mean"] / right["kl"] > wrong["kl_of_mean"] / wrong["kl"]


def test_wrong_values_are_usage_errors(tmp_path, monkeypatch, capsys):
    """In this process: each of its own would import torch and matplotlib."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    (tmp_path / "file").touch()
    for arguments in (("--epochs", "0"), ("--seed", "-1"), ("--out", tmp_path / "file" / "x")):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("usage:")


def test_the_page_shows_every_committed_figure():
    page = (DOCS / "which-kl.md").read_text()
    assert {p.name for p in (DOCS / "which-kl").glob("*.png")} == FIGURES
    for name in FIGURES:
        assert f"(which-kl/{name})" in page


def test_the_committed_trainings_show_what_the_page_says():
    results = json.loads((DOCS / "which-kl" / "summary.json").read_text())["results"]
    right, wrong = (results[name] for name in ("mean of the KLs", "KL of the mean"))
    assert wrong["kl_of_mean"] < 0.02 * wrong["kl"]
    assert wrong["kl"] > 10 * right["kl"]
    assert wrong["share_of_codes_within_2_std"] < 0.1 < right["share_of_codes_within_2_std"]
    assert right["elbo"] > wrong["elbo"] + 10
    assert wrong["reconstruction"] < right["reconstruction"]
    assert right["report"]["information"] > 0.99 * right["report"]["kl"]
    assert right["report"]["collapsed_units"] == 0
