"""bench/peers.py, as short as it gets: a line for every case of a package that is there."""

import json
import subprocess
import sys

import peer_cases
import peer_packages
import pytest

from paths import BENCH

pytestmark = pytest.mark.peers
SCRIPT = BENCH / "peers.py"


def test_a_line_for_each_case(tmp_path):
    out = tmp_path / "peers.json"
    command = [sys.executable, SCRIPT, "--seconds", "0.01", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    data = json.loads(out.read_text())
    absent = {p for p in peer_packages.PACKAGES if peer_packages.missing(p) is not None}
    expected = [case.name for case in peer_cases.CASES if case.package not in absent]
    assert [row["name"] for row in data["rows"]] == expected
    assert all(row["theirs_seconds"] > 0 and row["ours_seconds"] > 0 for row in data["rows"])
    listed = {entry["package"] for entry in data["not_compared"]}
    assert listed == {peer_packages.PACKAGES[p] for p in absent}
    for package in absent:
        assert f"not compared: {peer_packages.PACKAGES[package]}" in done.stdout
