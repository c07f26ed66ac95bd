"""A line per function of another project: its own code beside vaekl's, on the same inputs.

    .venv-peers/bin/python bench/peers.py --out bench/results/peers.json

Forward and backward of the sample and the KL in the reduction that it trains with, both with noise
of their own, taking turns. What cannot be timed is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment
import peer_cases
import peer_packages
import timing
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table


def step(
    function: Callable[..., Any], leaves: peer_packages.Leaves, *more: Any
) -> Callable[[], Any]:
    """Forward and backward, with upstream gradients that are there beforehand."""
    upstream = [torch.randn_like(output) for output in function(leaves, *more)]
    return lambda: torch.autograd.grad(function(leaves, *more), leaves, upstream)


def measure(case: peer_packages.Case, device: str, budget: float) -> dict[str, Any]:
    """Median seconds of both."""
    leaves = case.leaves(torch.float32, device)
    calls = {"theirs": step(case.theirs, leaves), "ours": step(case.ours, leaves, None)}
    samples = timing.interleaved(calls, device, budget)
    return {
        "name": case.name,
        "package": peer_packages.PACKAGES[case.package],
        "version": peer_packages.version(case.package),
        "shape": list(case.shapes[0]),
        **{f"{name}_seconds": statistics.median(values) for name, values in samples.items()},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line (2)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {
        "device": environment.describe(device),
        "rows": [],
        "not_compared": [],
    }
    reasons = {package: peer_packages.missing(package) for package in peer_packages.PACKAGES}
    for case in track(peer_cases.CASES, "peers", console=Console(stderr=True)):
        if reasons[case.package] is None:
            result["rows"].append(measure(case, device, args.seconds))
    for package, reason in reasons.items():
        if reason is not None:
            entry = {"package": peer_packages.PACKAGES[package], "reason": reason}
            result["not_compared"].append(entry)
    table = Table("", "leaf", "theirs ms", "vaekl ms", "times as fast")
    for row in result["rows"]:
        theirs, ours = row["theirs_seconds"], row["ours_seconds"]
        shape = "x".join(map(str, row["shape"]))
        figures = (f"{theirs * 1e3:.3f}", f"{ours * 1e3:.3f}", f"{theirs / ours:.2f}")
        table.add_row(row["name"], shape, *figures)
    load = os.getloadavg()[0]
    table.caption = f"{result['device']['name']}, float32, forward + backward, load {load:.1f}"
    Console(width=100).print(table)
    for entry in result["not_compared"]:
        print(f"not compared: {entry['package']} ({entry['reason']})")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
