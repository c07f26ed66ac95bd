"""Counts of the project's own launches, as `python -m ptx` prints them."""

import os
import re
import subprocess
import sys
from collections import Counter

from paths import ROOT


def test_the_counts_of_both_kernels():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "ptx"],
        capture_output=True, text=True, env=environment, cwd=ROOT / "tests",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split("; ") for line in done.stdout.splitlines()[1:]]
    kernels = Counter(row[0].split("_kernel ")[0] for row in rows)
    assert kernels == {"forward": 16, "backward": 16, "statistics": 2}
    for row in rows:
        instructions, steps = (tuple(map(int, row[i].split(", "))) for i in (2, 3))
        assert instructions[0] <= instructions[1]
        assert 1 <= steps[0] <= steps[1]
        assert 1 <= float(row[4]) <= 32
        if row[0].startswith("backward"):
            assert instructions[0] == instructions[1]
        elif row[1] != "1":  # the last program reads what the others wrote, in few rounds
            assert 0 < steps[1] - steps[0] <= 6, row
    sectors = {row[0]: float(row[4]) for row in rows}
    last = [name for name in sectors if "channels_last" in name]
    assert len(last) == 10
    for name in last:
        first = re.sub("(packed )?channels_last", "contiguous", name)
        assert sectors[name] <= 1.25 * sectors[first], name
