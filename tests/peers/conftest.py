"""Tests against the code that other projects ship; ``make test-peers`` makes their environment."""

import sys

import pytest

from paths import BENCH

sys.path.insert(0, str(BENCH))

import peer_packages


def need(package):
    """Skip where a package is not there; the last lines of the run name it."""
    reason = peer_packages.missing(package)
    if reason is not None:
        pytest.skip(f"not compared: {peer_packages.PACKAGES[package]} ({reason})")


@pytest.fixture(autouse=True)
def _compared(request):
    """Every test here says which package it compares with, by a marker or its case."""
    marker = request.node.get_closest_marker("peer")
    if marker is not None:
        need(marker.args[0])
    elif "case" in request.fixturenames:
        need(request.getfixturevalue("case").package)


def pytest_terminal_summary(terminalreporter):
    """What was compared and what was not, whatever else is shown."""
    if terminalreporter.config.option.markexpr != "peers":
        return
    terminalreporter.section("peers")
    for package, name in peer_packages.PACKAGES.items():
        reason = peer_packages.missing(package)
        if reason is None:
            terminalreporter.line(f"compared: {name} {peer_packages.version(package)}")
        else:
            terminalreporter.line(f"not compared: {name} ({reason})")
