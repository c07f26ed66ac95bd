"""What a whole training step gains: three models, each with plain code and with vaekl, in turns.

    python bench/training.py --out bench/results/training.json

A step is forward, backward and Adam on one batch that stays the same. Both start from the same
weights, and their KLs are compared first. On a GPU also as one CUDA graph.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import environment
import providers
import screen
import tables
import timing
import torch
from torch import Tensor, nn
from torch.distributions import NegativeBinomial
from torch.nn import functional

import vaekl

# (mu, logvar) or moments [B, 2 C, ...] -> z and the mean of the KLs
Posterior = Callable[..., tuple[Tensor, Tensor]]


def _plain(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return providers.plain(mu, logvar, False)[:2]


def _plain_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    mu, logvar = moments.chunk(2, 1)
    return _plain(mu, logvar.clamp(-30.0, 20.0))


def _distributions(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return providers.distributions(mu, logvar, False)[:2]


def _vaekl(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return vaekl.reparameterize_kl(mu, logvar, kl_of_mean=False)[:2]


def _vaekl_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    found = vaekl.reparameterize_kl_moments(moments, clamp=(-30.0, 20.0), kl_of_mean=False)
    return found[:2]


def _layers(*sizes: int) -> nn.Sequential:
    """Linear layers, ReLU between them."""
    pairs = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[layer for pair in pairs for layer in pair][:-1])


class Perceptron(nn.Module):
    """The VAE of pytorch/examples: 784 pixels, 400 hidden units, 20 codes."""

    batch, posteriors = (128, 784), {"plain": _plain, "vaekl": _vaekl}

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(784, 400), nn.ReLU())
        self.mu, self.logvar = nn.Linear(400, 20), nn.Linear(400, 20)
        self.decoder = _layers(20, 400, 784)

    def forward(self, x: Tensor, posterior: Posterior) -> tuple[Tensor, Tensor]:
        """-log p(x | z) of a sample, averaged, and the KL."""
        hidden = self.hidden(x)
        z, kl = posterior(self.mu(hidden), self.logvar(hidden))
        bce = functional.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return bce / len(x), kl


class Autoencoder(nn.Module):
    """A small AutoencoderKL: convolutions from 3x64x64 to moments 8x16x16 and back."""

    batch, posteriors = (16, 3, 64, 64), {"plain": _plain_moments, "vaekl": _vaekl_moments}

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(64, 8, 3, padding=1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(4, 64, 4, stride=2, padding=1), nn.SiLU(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(32, 3, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor, posterior: Posterior) -> tuple[Tensor, Tensor]:
        """As above, of a Gaussian likelihood."""
        z, kl = posterior(self.encoder(x))
        return functional.mse_loss(self.decoder(z), x, reduction="sum") / len(x), kl


class Counts(nn.Module):
    """Of the size of scVI's: 2000 genes, 128 hidden units, 10 codes, negative binomial counts."""

    batch, posteriors = (128, 2000), {"plain": _distributions, "vaekl": _vaekl}

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = _layers(2000, 128, 20), _layers(10, 128, 2000)
        self.log_dispersion = nn.Parameter(torch.zeros(2000))

    def forward(self, x: Tensor, posterior: Posterior) -> tuple[Tensor, Tensor]:
        """As above."""
        counts = (10 * x).round()
        mean, raw = self.encoder(counts.log1p()).chunk(2, 1)
        z, kl = posterior(mean, raw)
        rate = self.decoder(z).softmax(1) * counts.sum(1, keepdim=True)
        logits = torch.log(rate + 1e-8) - self.log_dispersion
        likelihood = NegativeBinomial(self.log_dispersion.exp(), logits=logits, validate_args=False)
        return -likelihood.log_prob(counts).sum() / len(x), kl


MODELS = (Perceptron, Autoencoder, Counts)


def _step(model: nn.Module, x: Tensor, posterior: Posterior) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, capturable=x.is_cuda)

    def step() -> None:
        optimizer.zero_grad()
        reconstruction, kl = model(x, posterior)
        (reconstruction + kl).backward()
        optimizer.step()

    return step


def measure(kind: type[Perceptron], device: str, budget: float) -> dict[str, Any]:
    """Median seconds of both; ArithmeticError if their KLs differ."""
    torch.manual_seed(0)
    x, model = torch.rand(kind.batch, device=device), kind().to(device)
    kls = [model(x, posterior)[1].item() for posterior in kind.posteriors.values()]
    if abs(kls[0] / kls[1] - 1) > 1e-4:
        raise ArithmeticError(f"KLs of {kind.__name__} differ: {kls}")
    steps = {name: _step(deepcopy(model), x, p) for name, p in kind.posteriors.items()}
    samples = timing.interleaved(steps, device, budget)
    row = {"model": kind.__name__, "batch": kind.batch, "what": str(kind.__doc__)}
    row |= {name: statistics.median(values) for name, values in samples.items()}
    if device == "cuda":
        row |= {f"{name}_graph": timing.graph_seconds(step) for name, step in steps.items()}
    return row


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each model (10)")
    parser.add_argument("--commit", default="", help="what is measured, where git cannot say")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [measure(kind, device, args.seconds) for kind in screen.track(MODELS, "training steps")]
    result = {"device": environment.describe(device), "rows": rows}
    if args.commit:
        result["device"]["commit"] = args.commit
    headings, lines = tables.steps_table(rows)
    screen.table("A training step", headings, lines, words=1, width=160)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
