"""The demo, in a short setting."""

import json
import os
import runpy
import subprocess
import sys

import pytest

from paths import EXAMPLES

DEMO = EXAMPLES / "digits.py"


def run(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "error", DEMO, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_two_epochs(tmp_path):
    done = run("--epochs", "2", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout
    assert {p.name for p in tmp_path.glob("*.png")} == {
        "reconstructions.png",
        "latent.png",
        "kl.png",
    }
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["train"]["kl_of_mean"] <= summary["train"]["kl"]
    assert summary["check"]["passed"]


def test_wrong_values_are_usage_errors(tmp_path, monkeypatch, capsys):
    """In this process: each of its own would import torch and matplotlib."""
    for arguments in (("--epochs", "0"), ("--seed", "-1"), ("--device", "nowhere")):
        monkeypatch.setattr(sys, "argv", [str(DEMO), *arguments, "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(DEMO), run_name="__main__")
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("usage:")
