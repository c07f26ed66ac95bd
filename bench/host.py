"""Host time of a call, kernels excluded: the whole Python path over a driver that launches nothing.

    python bench/host.py [--out bench/results/host.json]

Tensors lie on the CPU, so allocation is the CPU allocator's; a CUDA generator's key is stood in
for by seed= (a CUDA draw of the key is three calls of its generator). Beside it: what plain torch
would have to launch, as operators counted times this machine's cost of one tiny operator.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import screen
import stub_driver
import timing
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

stub_driver.use("sm_90")

import vaekl  # noqa: E402
from vaekl import _validate  # noqa: E402
from vaekl.reference import torch_reparameterize_kl  # noqa: E402

# All calls take turns, so that what else the machine does hits all alike.
ROUNDS, CALLS = 30, 200
SHAPES = [(128, 20), (64, 10), (1024, 32), (512, 256)]
VIEWS = ("aten.view", "aten.expand", "aten.detach", "aten.t", "aten._unsafe_view", "aten.alias")


class CountOperators(TorchDispatchMode):
    """Counts what would launch a kernel: operators that are no views."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """One more, unless a view."""
        if not str(function).startswith(VIEWS):
            self.count += 1
        return function(*args, **(kwargs or {}))


def prepare(
    shape: tuple[int, int], kl_of_mean: bool
) -> tuple[dict[str, Any], dict[str, timing.Call]]:
    """A row with the operators of the plain call; the fused calls to time."""
    mu, logvar, dz = (torch.randn(shape) for _ in range(3))
    mu.requires_grad_()
    logvar.requires_grad_()
    one = torch.ones(())

    def forward() -> Any:
        return vaekl.reparameterize_kl(mu, logvar, kl_of_mean=kl_of_mean, seed=1, backend="triton")

    def both() -> None:
        out = forward()
        outputs = [out.z, out.kl] + ([out.kl_of_mean] if kl_of_mean else [])
        torch.autograd.grad(outputs, (mu, logvar), [dz, one, one][: len(outputs)])

    def plain() -> Any:
        z, kl, of_mean = torch_reparameterize_kl(mu, logvar)
        return [z, kl] + ([of_mean] if kl_of_mean else [])

    # What is not used is not computed by a user either: count the graph that is needed.
    with CountOperators() as forward_count:
        outputs = plain()
    with CountOperators() as backward_count:
        torch.autograd.grad(outputs, (mu, logvar), [dz, one, one][: len(outputs)])
    row = {
        "name": f"{list(shape)}, {'both KLs' if kl_of_mean else 'one KL'}",
        "forward_us": None,
        "forward_backward_us": None,
        "plain_operators": forward_count.count + backward_count.count,
    }
    return row, {"forward_us": forward, "forward_backward_us": both}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    _validate._interpreting = lambda: True  # CPU tensors may go to the Triton path
    torch.set_num_threads(1)
    tiny, out = torch.ones(1), torch.empty(1)
    prepared = [prepare(shape, both) for shape in SHAPES for both in (True, False)]
    calls: dict[Any, timing.Call] = {
        (i, key): call for i, (_, pair) in enumerate(prepared) for key, call in pair.items()
    }
    calls["operator"] = lambda: torch.add(tiny, tiny, out=out)
    samples: dict[Any, list[float]] = {key: [] for key in calls}
    with timing.no_collection():
        for _ in screen.track(range(ROUNDS), "host time", ROUNDS):
            for key, call in calls.items():
                samples[key].append(timing.sample(call, CALLS, "cpu"))
    median = {key: 1e6 * statistics.median(values) for key, values in samples.items()}
    operator_us = round(median["operator"], 2)
    rows = [row for row, _ in prepared]
    for i, row in enumerate(rows):
        for key in ("forward_us", "forward_backward_us"):
            row[key] = round(median[i, key], 1)
    for row in rows:
        row["plain_us"] = round(row["plain_operators"] * operator_us, 1)
    screen.table(
        f"Host time, kernels excluded; a tiny torch operator takes {operator_us} µs here",
        ("call", "forward µs", "forward + backward µs", "plain torch: operators", "at least µs"),
        [list(map(str, row.values())) for row in rows],
        words=1,
    )
    if args.out:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        result = {
            "machine": processor(),
            "versions": {**versions, "triton": triton.__version__},
            "operator_us": operator_us,
            "rows": rows,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.processor()


if __name__ == "__main__":
    main()
