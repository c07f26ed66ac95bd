"""Compile what the launcher would launch, for GPUs that are not there, and read the machine code.

    python bench/codegen.py [--all] [--targets sm_90 gfx942] [--out codegen.json]

The launcher itself runs, with its own block choices, over a driver that throws launches away
(stub_driver.py). For each compiled kernel: registers, stack, shared memory, 128-bit accesses,
instructions an element in the main loop, barrier before the counter's atomic, Philox multiplies.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton

sys.path.insert(0, str(Path(__file__).parent))
import disassembly
import screen
import stub_driver
import variants


def compile_variant(target: str, variant: variants.AnyVariant) -> list[dict[str, Any]]:
    """A row for each kernel that the launcher compiles for this variant."""
    stub_driver.use(target)
    rows = []
    for name, compiled, grid in variants.launch(variant):
        per_thread = grid.block_rows * grid.block_cols / grid.threads
        if target.startswith("gfx"):
            facts = disassembly.read_amdgcn(compiled.asm["amdgcn"])
        else:
            facts = disassembly.read_cubin(compiled.asm["cubin"], compiled.asm["ptx"])
            facts["instructions_per_element"] = round(facts["loop_instructions"] / per_thread, 1)
        rows.append(
            {
                "kernel": name,
                "target": target,
                "variant": variant.name,
                "threads": grid.threads,
                "elements_per_thread": per_thread,
                "shared": compiled.metadata.shared,
                "narrow_starts": disassembly.narrow_starts(compiled.asm["ttir"]),
                **facts,
            }
        )
    return rows


def compile_all(
    chosen: list[variants.AnyVariant], targets: list[str], workers: int = 2
) -> list[Any]:
    """Rows of every variant on every target, in order; Triton's cache makes a second run quick."""
    rows: list[Any] = []
    each = [(target, variant) for target in targets for variant in chosen]
    # One pool for all targets: to import torch and triton takes longer than some variants do.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        results = pool.map(compile_variant, *zip(*each), chunksize=4)
        for result in screen.track(results, "compiling", len(each)):
            rows += result
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The facts of each kernel, one line each."""
    columns = {
        "registers": "registers",
        "shared": "shared",
        "stack": "stack",
        "instructions_per_element": "instr/element",
        "wide_loads": "128-bit loads",
        "wide_stores": "stores",
        "half_wide_loads": "64-bit loads",
        "half_wide_stores": "stores",
    }
    first = ("target", "kernel", "variant")
    cells = [[str(row.get(column, "")) for column in (*first, *columns)] for row in rows]
    screen.table("Machine code", (*first, *columns.values()), cells, words=3, width=150)


def write_ceilings(rows: list[dict[str, Any]]) -> None:
    """A little above today's figures, so that a regression shows and noise of a compiler not."""
    ceilings = {}
    for row in rows:
        limits = {"registers": math.ceil(1.1 * row["registers"] / 8) * 8}
        if "instructions_per_element" in row:
            limits["instructions_per_element"] = round(1.05 * row["instructions_per_element"], 1)
        ceilings[f"{row['target']} {row['kernel']} {row['variant']}"] = limits
    reason = (
        "Registers: 1.1 times what this triton gave, rounded up to 8 (the unit of allocation); "
        "instructions an element in the main loop: 1.05 times. Raise one only with the reason in "
        "the commit that does it."
    )
    path = Path(__file__).with_name("codegen_ceilings.json")
    written = {"triton": triton.__version__, "reason": reason, "ceilings": ceilings}
    path.write_text(json.dumps(written, indent=1) + "\n")


def main() -> None:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="the whole matrix, not the subset")
    parser.add_argument(
        "--targets", nargs="+", choices=list(stub_driver.TARGETS), default=["sm_90"]
    )
    parser.add_argument("--write-ceilings", action="store_true", help="renew codegen_ceilings.json")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    chosen = variants.matrix() if args.all else variants.subset()
    rows = compile_all(chosen, args.targets)
    show(rows)
    if args.write_ceilings:
        write_ceilings(rows)
    if args.out:
        args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
