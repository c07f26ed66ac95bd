"""What a prior costs: forward and backward beside those to N(0, I), and torch.distributions.

    python bench/priors.py --out bench/results/priors.json

The sample and the mean of the KLs, float32, the automatic backend; all in turns, in one run. A
dense prior has a mean and scale for each element of the batch, a shared one for each of an event;
learned, both get gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment
import screen
import timing
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import vaekl

SHAPES = ((128, 20), (1024, 512))
Loss = Callable[..., tuple[Tensor, Tensor]]


def _vaekl(scale: str) -> Loss:
    def loss(mu: Tensor, given: Tensor, *prior: Tensor) -> tuple[Tensor, Tensor]:
        found = vaekl.reparameterize_kl(
            mu, given, scale=scale, prior=(prior[0], prior[1]) if prior else None, kl_of_mean=False
        )
        return found[:2]

    return loss


def _distributions(mu: Tensor, std: Tensor, *prior: Tensor) -> tuple[Tensor, Tensor]:
    posterior = Normal(mu, std, validate_args=False)
    of_prior = Normal(prior[0], prior[1], validate_args=False)
    return posterior.rsample(), kl_divergence(posterior, of_prior).sum(-1).mean()


def _step(loss: Loss, given: list[Tensor]) -> timing.Call:
    leaves = [t for t in given if t.requires_grad]
    upstream = [torch.randn_like(output) for output in loss(*given)]
    return lambda: torch.autograd.grad(loss(*given), leaves, upstream)


def calls(shape: tuple[int, int], device: str) -> dict[str, timing.Call]:
    """By what is timed."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": device, "requires_grad": True}
    mu, logvar, mean, prior = (torch.randn(shape, **options) for _ in range(4))
    std, prior_std = ((0.5 * t).exp().detach().requires_grad_() for t in (logvar, prior))
    shared = [t[0].detach().requires_grad_() for t in (mean, prior)]
    logs = _vaekl("logvar")
    pair = [mu, logvar]
    return {
        "N(0, I)": _step(logs, pair),
        "dense, constant": _step(logs, [*pair, mean.detach(), prior.detach()]),
        "dense, learned": _step(logs, [*pair, mean, prior]),
        "shared, constant": _step(logs, [*pair, *(t.detach() for t in shared)]),
        "shared, learned": _step(logs, [*pair, *shared]),
        "dense, learned, std": _step(_vaekl("std"), [mu, std, mean, prior_std]),
        "torch.distributions": _step(_distributions, [mu, std, mean, prior_std]),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each shape (20)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {"device": environment.describe(device), "rows": []}
    for shape in SHAPES:
        samples = timing.interleaved(calls(shape, device), device, args.seconds)
        seconds = {name: statistics.median(values) for name, values in samples.items()}
        result["rows"].append({"shape": list(shape), "seconds": seconds})
    names = list(result["rows"][0]["seconds"])
    lines = [
        ["x".join(map(str, row["shape"])), *(f"{row['seconds'][n] * 1e3:.3f}" for n in names)]
        for row in result["rows"]
    ]
    screen.table("Forward + backward, ms", ("shape", *names), lines, words=1, width=150)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
