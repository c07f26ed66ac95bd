"""KLs of a posterior that has all but collapsed onto its prior, by other people's formulas.

    python bench/numerics.py [--out bench/results/numerics.json]

One element: N(0, e^(l + delta)) beside N(0, e^l). Each formula gets what its users have, in the
dtype that they compute in. Exact is the float64 oracle's KL of the same rounded logarithms.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

sys.path.insert(0, str(Path(__file__).parent))
import screen
from environment import describe

import vaekl
from vaekl.reference import Oracle

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRIORS = (0.0, -6.0)
DELTAS = (1e-1, 1e-2, 1e-3, 1e-4)


def distributions(logvar: Tensor, prior: Tensor) -> Tensor:
    """torch.distributions, of standard deviations."""
    std, prior_std = (torch.exp(0.5 * v) for v in (logvar, prior))
    zero = torch.zeros_like(std)
    return kl_divergence(Normal(zero, std), Normal(zero, prior_std))


def vdvae(logvar: Tensor, prior: Tensor) -> Tensor:
    """VDVAE's and NVAE's form, of logarithms of standard deviations (Child 2021)."""
    s, prior_s = 0.5 * logvar, 0.5 * prior
    return prior_s - s - 0.5 + 0.5 * s.exp() ** 2 / prior_s.exp() ** 2


def diffusers(logvar: Tensor, prior: Tensor) -> Tensor:
    """That of diffusers' ``kl(other)``, and of multivae."""
    return 0.5 * (logvar.exp() / prior.exp() - 1.0 - logvar + prior)


def ours(logvar: Tensor, prior: Tensor) -> Tensor:
    """vaekl's."""
    zero = torch.zeros_like(logvar)
    return vaekl.kl_loss(zero, logvar, prior=(zero, prior))


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch.distributions": distributions,
    "VDVAE": vdvae,
    "diffusers": diffusers,
    "vaekl": ours,
}


def measure() -> list[dict[str, Any]]:
    """A row for each dtype, prior and distance."""
    rows = []
    for name, dtype in DTYPES.items():
        for of_prior in PRIORS:
            for delta in DELTAS:
                pair = [torch.tensor([[v]]).to(dtype) for v in (of_prior + delta, of_prior)]
                zero = torch.zeros_like(pair[0])
                exact = float(Oracle(zero, pair[0], prior=(zero, pair[1])).kl)
                if exact == 0:
                    continue  # rounded to the same number
                found = {formula: float(f(*pair)) for formula, f in FORMULAS.items()}
                rows.append(
                    {"dtype": name, "prior_logvar": of_prior, "delta": delta, "exact": exact}
                    | {"found": found}
                )
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    rows = measure()
    cells = [
        [row["dtype"], f"{row['prior_logvar']:g}", f"{row['delta']:g}", f"{row['exact']:.4g}"]
        + [f"{value:.4g}" for value in row["found"].values()]
        for row in rows
    ]
    screen.table("KL, nats", ("dtype", "l", "delta", "exact", *FORMULAS), cells, words=1, width=110)
    if args.out:
        args.out.write_text(json.dumps({"device": describe("cpu"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
