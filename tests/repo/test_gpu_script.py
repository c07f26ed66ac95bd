"""bench/gpu.sh, in its dry form: every step runs, and the table says how each ended."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from paths import BENCH, ROOT

SCRIPT = BENCH / "gpu.sh"
STEPS = ["machine", "install", "suite", "gpu", "training", "bench", "memcheck"]

pytestmark = pytest.mark.skipif(
    not shutil.which("bash") or not shutil.which("timeout"), reason="needs bash and coreutils"
)


def run(*arguments, cwd, **variables):
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(
        ["bash", SCRIPT, *arguments], capture_output=True, text=True, cwd=cwd, env=environment
    )


def table(text):
    """{step: (status, summary)} of the table's lines."""
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:2] == ["step", "seconds"])
    rows = [line.split(None, 3) for line in lines[head + 1 :]]
    return {row[0]: row[2:] for row in rows}


def test_every_step_runs_dry(tmp_path):
    """From another folder, into one with a space in its name."""
    out = tmp_path / "a folder"
    done = run("--dry", "a folder", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table(done.stdout)
    assert list(rows) == STEPS
    assert all(status == "ok" for status, _ in rows.values()), done.stdout
    assert "passed" in rows["suite"][1]
    for step in ("gpu", "memcheck"):
        assert ("skipped" in rows[step][1]) != torch.cuda.is_available()

    assert (out / "summary.txt").read_text().endswith(done.stdout)
    assert "torch" in (out / "summary.txt").read_text()
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert {"summary.txt", "suite.log", "gpu.log", "bench.log"} <= {str(path) for path in files}
    assert len(files) <= 9
    assert all(len(path.parts) <= 2 for path in files)
    assert any(path.suffix == ".json" for path in files)


def test_a_spent_budget_is_a_failure(tmp_path):
    """Steps that get no time are in the table, and the exit status tells."""
    done = run("--dry", tmp_path, cwd=tmp_path, BUDGET="0")
    assert done.returncode == 1
    rows = table(done.stdout)
    assert list(rows) == STEPS
    assert rows.pop("machine")[0] == "ok"
    assert all(" ".join(row).startswith("no time") for row in rows.values()), done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(tmp_path):
    done = run(tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    assert "torch sees no CUDA or ROCm device" in done.stdout
    assert list(table(done.stdout)) == ["machine"]


@pytest.mark.parametrize(
    "arguments", [(), ("--dry",), ("--help",), ("a", "b")], ids=lambda a: " ".join(a) or "none"
)
def test_wrong_arguments(arguments, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "usage" in done.stderr
    assert not list(tmp_path.iterdir())


def test_no_file_of_device_tests_is_forgotten():
    """The script runs their folder, and no other folder has any."""
    assert '"$root/tests/gpu"' in SCRIPT.read_text()
    mark = "pytest.mark." + "gpu"
    folders = {path.parent for path in ROOT.glob("tests/**/*.py") if mark in path.read_text()}
    assert folders == {ROOT / "tests" / "gpu"}
