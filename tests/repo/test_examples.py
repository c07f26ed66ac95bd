"""The examples that need only the demo's packages, in a short setting; warnings are errors."""

import os
import re
import subprocess
import sys

import pytest

from paths import EXAMPLES


def run(name, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "error", EXAMPLES / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_count_model():
    done = run("count_model.py", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    terms = re.search(r"-log p (\S+)  KL (\S+)  KL of mean (\S+) nats", done.stdout)
    nll, kl, kl_of_mean = map(float, terms.groups())
    assert 100 < nll < 400
    assert kl >= kl_of_mean > 0


def test_ladder(tmp_path):
    out = tmp_path / "ladder.png"
    done = run("ladder.py", "--epochs", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    nll, kl1, kl2 = map(
        float, re.search(r"-log p (\S+)  KLs (\S+) and (\S+)", done.stdout).groups()
    )
    assert 20 < nll < 50
    assert kl1 > 0 < kl2
    assert out.read_bytes().startswith(b"\x89PNG")


def test_recurrent(tmp_path):
    out = tmp_path / "recurrent.png"
    done = run("recurrent.py", "--epochs", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    nll, kl = map(float, re.search(r"-log p (\S+)  KL (\S+) nats", done.stdout).groups())
    assert 3 < nll < 8
    assert kl >= 1
    assert out.read_bytes().startswith(b"\x89PNG")


# The others are longer: they compare whole trainings.
SHORT = sorted({path.name for path in EXAMPLES.glob("*.py")} - {"digits.py", "which_kl.py"})


@pytest.mark.parametrize("name", SHORT)
def test_short_and_with_its_difference(name):
    """At most 100 lines, 120 with a figure; its docstring shows lines to take out and to put in."""
    path = EXAMPLES / name
    lines = path.read_text().splitlines()
    assert len(lines) <= (120 if "savefig" in path.read_text() else 100)
    docstring = path.read_text().split('"""')[1]
    assert re.search(r"^    \+   .*vaekl\.", docstring, re.MULTILINE)
    assert re.search(r"^    -   ", docstring, re.MULTILINE)
