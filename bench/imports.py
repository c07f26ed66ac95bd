"""What `import vaekl` adds to `import torch`: processor time of fresh processes.

python bench/imports.py [--out bench/results/imports.json] [--runs 15]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from vaekl._environment import cpu_name, version

CODE = """
import time
started = time.process_time()
import torch
torch_is_there = time.process_time()
import vaekl
print(torch_is_there - started, time.process_time() - torch_is_there)
"""


def seconds() -> tuple[float, float]:
    """Of importing torch, and of vaekl after it, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    of_torch, of_vaekl = map(float, done.stdout.split())
    return of_torch, of_vaekl


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--runs", type=int, default=15, help="processes (15)")
    args = parser.parse_args()
    seconds()  # bytecode of both is on disk from now on
    of_torch, of_vaekl = map(statistics.median, zip(*(seconds() for _ in range(args.runs))))
    result = {
        "machine": cpu_name(),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "runs": args.runs,
        "torch_ms": round(1e3 * of_torch),
        "vaekl_ms": round(1e3 * of_vaekl, 1),
    }
    print(f"import torch: {result['torch_ms']} ms; import vaekl after it: {result['vaekl_ms']} ms")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
