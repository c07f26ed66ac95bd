"""A model of an H100's time for the shapes of cases.py: no measurement, and marked so where shown.

    python bench/model.py --out bench/results/model.json

The largest of three bounds, and then what the last program adds. Bytes that have to be moved, at
the rate of a large copy; instructions of all lanes, idle ones too, at one for each lane and cycle;
a program's iterations, of which each waits once for memory. The last program of a launch waits for
an atomic and for two reads in each round of sums (``kernels/reduction.py``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import cases
import torch

from vaekl.backends import layout

RESULTS = Path(__file__).parent / "results"
COPY = 3.0e12  # bytes a second
ISSUE = 132 * 128 * 1.755e9  # multiprocessors x lanes x cycles a second
LATENCY = 0.7e-6  # seconds of a wait for memory
WAITS = 3  # of a round
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def instructions() -> dict[str, float]:
    """Of an element, by kernel and dtype, from the machine code for sm_90."""
    found = {}
    for row in json.loads((RESULTS / "codegen.json").read_text())["rows"]:
        dtype, *what = row["variant"].split()
        if row["target"] == "sm_90" and what == ["many", "kl=batchmean", "of_mean=batch", "z"]:
            found[f"{row['kernel']} {dtype}"] = row["instructions_per_element"]
    return found


def seconds(case: cases.Case, of_element: dict[str, float]) -> dict[str, float]:
    """Of forward and backward with both KLs, and of their bytes alone."""
    config = layout.current_config()
    view = layout.rows(case.shape[0], case.elements // case.shape[0], 4)
    view = layout.beside(view, config, is_drawn=True)
    grid = layout.grid(view.rows, view.width, config)
    lanes = grid.tiles * grid.block_cols * grid.ranges * grid.rows_per_range
    iterations = grid.rows_per_range // grid.block_rows * -(-grid.tiles // grid.walkers)
    last = layout.rounds(grid.ranges, config.group) + (grid.walkers > 1)
    total = 0.0
    for kernel in ("forward", "backward"):
        bytes_ = case.floor_bytes(kernel) / COPY
        issued = lanes * of_element[f"{kernel} {DTYPES[case.dtype]}"] / ISSUE
        total += max(bytes_, issued, iterations * LATENCY)
    total += (WAITS * last + 1) * LATENCY  # and backward's for what does not depend on the row
    return {"floor_seconds": case.floor_bytes("forward+backward") / COPY, "seconds": total}


def main() -> None:
    """Work it out, and write it; what a file says of the time before a change stays there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "model.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    old = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    before = {row["case"]: row.get("before_seconds") for row in old}
    of_element = instructions()
    for case in cases.select("cuda"):
        row = {"case": case.name, "before_seconds": before.get(case.name)}
        rows.append(row | seconds(case, of_element))
        print(f"{case.name}: {rows[-1]['seconds'] * 1e6:.1f} us")
    assumed = {"copy": COPY, "issue": ISSUE, "latency": LATENCY}
    args.out.write_text(json.dumps({"assumed": assumed, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
