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


# The others are longer: they draw, and compare whole trainings.
SHORT = sorted({path.name for path in EXAMPLES.glob("*.py")} - {"digits.py", "which_kl.py"})


@pytest.mark.parametrize("name", SHORT)
def test_short_and_with_its_difference(name):
    """At most 100 lines, and the docstring shows lines to take out and to put in."""
    path = EXAMPLES / name
    lines = path.read_text().splitlines()
    assert len(lines) <= 100
    docstring = path.read_text().split('"""')[1]
    assert re.search(r"^    \+   .*vaekl\.", docstring, re.MULTILINE)
    assert re.search(r"^    -   ", docstring, re.MULTILINE)
