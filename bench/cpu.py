"""The cpu backend in detail: where its time goes, how it grows, and what threads bring.

    python bench/cpu.py [--out bench/results/cpu-detail.json] [--quick]

- parts: calls that do one thing and calls that do several, each with the bytes that it has to move
  and the share of the machine's copy bandwidth that it reaches. One call beside another that does
  less shows the cost of the difference.
- small: forward and backward of small batches, beside plain torch and beside an autograd.Function
  that computes nothing: what is left to win.
- growth: time per element, and the most memory that a step held beyond its inputs, beside the
  bytes of its results.
- first call: seconds of the first forward and backward of a process, imports of torch and vaekl
  aside, with nothing compiled before and with compiled code on disk.
- threads: one against all, about the size from which work is shared out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment
import providers
import timing
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import vaekl

EVENT = 512
PARTS_BATCH = 4096
GROWTH = (200, 600, 2000, 6000, 20_000, 60_000, 200_000)
THREADS = (32, 64, 96, 128, 256, 1024, 4096)
SMALL = ((64, 10), (128, 20), (1024, 32))
FIRST_CALL = """
import time, torch, vaekl
x = torch.zeros(4, 3, requires_grad=True)
started = time.perf_counter()
out = vaekl.reparameterize_kl(x, x, seed=1, backend="cpu")
forward = time.perf_counter()
(out.z.sum() + out.kl).backward()
print(forward - started, time.perf_counter() - forward)
"""
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


class Inputs:
    """mu, logvar, eps and upstream gradients of a batch."""

    def __init__(self, batch: int) -> None:
        self.mu, self.logvar = (torch.randn(batch, EVENT) for _ in range(2))
        self.leaves = tuple(t.detach().requires_grad_() for t in (self.mu, self.logvar))
        self.upstream = (torch.randn(batch, EVENT), torch.tensor(0.7), torch.tensor(0.3))

    def forward(self, **options: Any) -> vaekl.functional.ReparamKL:
        """Without gradients."""
        return vaekl.reparameterize_kl(self.mu, self.logvar, backend="cpu", **options)

    def step(self) -> tuple[Tensor, ...]:
        """Forward and backward."""
        out = vaekl.reparameterize_kl(*self.leaves, backend="cpu")
        return (*out, *torch.autograd.grad(out, self.leaves, self.upstream))


def parts(budget: float) -> list[dict[str, Any]]:
    """Calls by what they do; bytes in tensors of mu's size."""
    data = Inputs(PARTS_BATCH)
    mu, logvar, eps = data.mu, data.logvar, torch.randn_like(data.mu)
    target = torch.empty_like(mu)
    out = vaekl.reparameterize_kl(*data.leaves, backend="cpu")
    backward = lambda: torch.autograd.grad(  # noqa: E731
        out, data.leaves, data.upstream, retain_graph=True
    )
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "copy of mu": (2, lambda: target.copy_(mu)),
        "kl alone: exp": (2, lambda: vaekl.kl_loss(mu, logvar, backend="cpu")),
        "z of a given eps: exp, writing": (
            4, lambda: vaekl.reparameterize(mu, logvar, eps=eps, backend="cpu")
        ),
        "z: noise, exp, writing": (3, lambda: vaekl.reparameterize(mu, logvar, backend="cpu")),
        "z and kl": (3, lambda: data.forward(kl_of_mean=False)),
        "forward: z and both KLs": (3, data.forward),
        "backward": (5, backward),
    }  # fmt: skip
    samples = timing.interleaved({name: call for name, (_, call) in calls.items()}, "cpu", budget)
    size = mu.numel() * mu.itemsize
    return [
        {"name": name, "seconds": statistics.median(samples[name]), "bytes": tensors * size,
         "elements": mu.numel()}
        for name, (tensors, _) in calls.items()
    ]  # fmt: skip


class Nothing(torch.autograd.Function):
    """Three results and two gradients that are there already."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, logvar: Tensor, results: tuple[Tensor, ...]) -> Any:
        ctx.gradients = results[0], results[0]
        return tuple(torch.empty_like(result) for result in results)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.gradients, None)


def small(budget: float) -> list[dict[str, Any]]:
    """Forward and backward: vaekl, an empty Function, plain torch."""
    rows = []
    for shape in SMALL:
        leaves = tuple(torch.randn(shape).requires_grad_() for _ in range(2))
        upstream = (torch.randn(shape), torch.tensor(0.7), torch.tensor(0.3))
        results = tuple(t.detach() for t in vaekl.reparameterize_kl(*leaves, backend="cpu"))
        functions: dict[str, Callable[[], Any]] = {
            "vaekl": lambda leaves=leaves: vaekl.reparameterize_kl(*leaves, backend="cpu"),
            "empty": lambda leaves=leaves, results=results: Nothing.apply(*leaves, results),
            "plain": lambda leaves=leaves: providers.plain(*leaves, True),
        }
        calls = {
            name: lambda call=call, leaves=leaves, upstream=upstream: torch.autograd.grad(
                tuple(call()), leaves, upstream
            )
            for name, call in functions.items()
        }
        samples = timing.interleaved(calls, "cpu", budget)
        rows.append(
            {"shape": shape} | {name: statistics.median(times) for name, times in samples.items()}
        )
    return rows


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Most memory that the process held during the call, beyond what it held before (Linux)."""
    if not CLEAR.exists():
        return None

    def held(key: str) -> int:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    CLEAR.write_text("5")  # the high-water mark starts anew
    before = held("VmRSS")
    call()
    return held("VmHWM") - before


def growth(batches: tuple[int, ...], budget: float) -> list[dict[str, Any]]:
    """Time per element, and memory, of ever larger batches."""
    rows = []
    for batch in track(batches, "growth"):
        data = Inputs(batch)
        calls = {"forward": data.forward, "forward+backward": data.step}
        samples = timing.interleaved(calls, "cpu", budget)
        row = {"shape": [batch, EVENT], "elements": batch * EVENT}
        row |= {name: statistics.median(values) for name, values in samples.items()}
        row["result_bytes"] = 3 * data.mu.nbytes  # z, dmu, dlogvar
        row["peak_bytes"] = peak_bytes(data.step)
        rows.append(row)
    return rows


def threads(batches: tuple[int, ...], budget: float) -> list[dict[str, Any]]:
    """Forward and backward on one thread and on all that torch uses."""
    most, rows = torch.get_num_threads(), []

    def on(count: int, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            torch.set_num_threads(count)
            call()

        return run

    for batch in track(batches, "threads"):
        data = Inputs(batch)
        calls = {"one": on(1, data.step), "all": on(most, data.step)}
        samples = timing.interleaved(calls, "cpu", budget)
        row: dict[str, Any] = {"shape": [batch, EVENT], "elements": batch * EVENT}
        rows.append(row | {name: statistics.median(values) for name, values in samples.items()})
    torch.set_num_threads(most)
    return rows


def first_call(quick: bool) -> list[dict[str, Any]]:
    """Of a process without compiled code on disk, unless it is to be quick, and of the next one."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ if quick else {**os.environ, "NUMBA_CACHE_DIR": folder}
        for cache in ("nothing compiled", "compiled code on disk")[quick:]:
            done = subprocess.run(
                [sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, check=True,
                env=environment,
            )  # fmt: skip
            forward, backward = map(float, done.stdout.split())
            rows.append({"name": cache, "forward": forward, "backward": backward})
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Seconds as they are."""
    shown = Table(title=title)
    for key in rows[0]:
        shown.add_column(key)
    for row in rows:
        shown.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    return shown


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--quick", action="store_true", help="small sizes, few samples")
    args = parser.parse_args()
    budget = 0.05 if args.quick else 2.0
    results = {
        "device": environment.describe("cpu"),
        "copy_bytes_per_second": timing.copy_bandwidth("cpu", budget),
        "parts": parts(budget),
        "small": small(budget),
        "growth": growth(GROWTH[:2] if args.quick else GROWTH, budget),
        "threads": threads(THREADS[:2] if args.quick else THREADS, budget),
        "first_call": first_call(args.quick),
    }
    console = Console(highlight=False)
    for name in ("parts", "small", "growth", "threads", "first_call"):
        console.print(table(name, results[name]))
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        console.print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
