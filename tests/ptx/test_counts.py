"""Counts of the project's own launches, as `python -m ptx` prints them."""

import os
import subprocess
import sys

from paths import ROOT


def test_the_counts_of_both_kernels():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "ptx"],
        capture_output=True, text=True, env=environment, cwd=ROOT / "tests",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split("; ") for line in done.stdout.splitlines()[1:]]
    forward, backward = rows[::2], rows[1::2]
    assert len(forward) == len(backward) == 9
    for row in rows:
        instructions, steps = (tuple(map(int, row[i].split(", "))) for i in (2, 3))
        assert instructions[0] <= instructions[1]
        assert 1 <= steps[0] <= steps[1]
        assert 1 <= float(row[4]) <= 32
    assert all(row[2].split(", ")[0] == row[2].split(", ")[1] for row in backward)
    # Several programs: the last reads what the others wrote, in few rounds.
    several = [tuple(map(int, row[3].split(", "))) for row in forward if row[1] != "1"]
    assert all(0 < last - median <= 6 for median, last in several), several
