"""A ladder VAE of two levels on handwritten digits: a learned prior for the lower level.

    pip install scikit-learn rich matplotlib && python examples/ladder.py

From the top down, as NVAE, VDVAE and ladders have it: z2 ~ q(z2 | x) beside N(0, I), then
z1 ~ q(z1 | x, z2) beside p(z1 | z2), both Gaussians made by networks. The lines that change::

    -   q, p = Normal(mu, std), Normal(prior_mu, prior_std)
    -   z1, kl1 = q.rsample(), kl_divergence(q, p).sum(-1).mean()
    +   z1, kl1, _ = vaekl.reparameterize_kl(
    +       mu, std, scale="std", prior=(prior_mu, prior_std), kl_of_mean=False)

The figure has each level's KL over the epochs, and digits that were drawn from the top.
"""

from __future__ import annotations

import argparse

import torch
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, pad, softplus

import vaekl

Pair = tuple[Tensor, Tensor]  # mean and standard deviation


def layers(inputs: int, outputs: int, hidden: int = 128) -> nn.Sequential:
    """One hidden layer."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


def gaussian(outputs: Tensor) -> Pair:
    """Mean and standard deviation of a network's outputs."""
    mu, raw = outputs.chunk(2, dim=-1)
    return mu, softplus(raw) + 1e-3


def sampled(posterior: Pair, prior: Pair | None) -> tuple[Tensor, Tensor]:
    """A sample, and the KL to the prior."""
    return vaekl.reparameterize_kl(*posterior, scale="std", prior=prior, kl_of_mean=False)[:2]


class Ladder(nn.Module):
    """Upwards features of x, downwards z2 [B, 4], z1 [B, 16] and pixels [B, 64]."""

    def __init__(self, pixels: int = 64, features: int = 64, low: int = 16, top: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(layers(pixels, features), nn.SiLU())
        self.top = layers(features, 2 * top)
        self.prior = layers(top, 2 * low)
        self.low = layers(features + top, 2 * low)
        self.pixels = layers(low, pixels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Averages over the batch in nats: -log p(x | z1), and the KL of each level."""
        features = self.features(x)
        z2, kl2 = sampled(gaussian(self.top(features)), None)
        prior = gaussian(self.prior(z2))
        z1, kl1 = sampled(gaussian(self.low(torch.cat([features, z2], dim=-1))), prior)
        logits = self.pixels(z1)
        return binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x), kl1, kl2

    def draw(self, count: int) -> Tensor:
        """Pixels of so many draws from the top down."""
        z1 = vaekl.reparameterize(*gaussian(self.prior(torch.randn(count, 4))), scale="std")
        return torch.sigmoid(self.pixels(z1))


def draw_figure(path: str, history: list[tuple[float, ...]], images: Tensor) -> None:
    """Each level's KL, and images that were drawn."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for level, values in zip(("z1 beside p(z1 | z2)", "z2 beside N(0, I)"), zip(*history)):
        left.plot(range(1, len(values) + 1), values, label=level)
    left.set(title="KL of each level", xlabel="epoch", ylabel="nats per image", ylim=(0, None))
    left.legend(frameon=False)
    padded = pad(images.reshape(4, 8, 8, 8), (1, 1, 1, 1))
    right.imshow(padded.permute(0, 2, 1, 3).reshape(40, 80).numpy(), cmap="gray_r", vmin=0, vmax=1)
    right.set(title="drawn from the top", xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--out", default="ladder.png", help="the figure")
    args = parser.parse_args()
    torch.manual_seed(0)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    model, history = Ladder(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    columns = (TextColumn("{task.description:<48}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=args.epochs)
        for epoch in range(args.epochs):
            warm_up = min(1.0, (epoch + 1) / 30)
            for x in images[torch.randperm(len(images))].split(128):
                bce, kl1, kl2 = model(x)
                optimizer.zero_grad()
                (bce + warm_up * (kl1 + kl2)).backward()
                optimizer.step()
            history.append((kl1.item(), kl2.item()))
            told = f"-log p {bce:.2f}  KLs {kl1:.2f} and {kl2:.2f} nats"
            progress.update(task, advance=1, description=told)
    print(told)
    with torch.no_grad():
        draw_figure(args.out, history, model.draw(32))


if __name__ == "__main__":
    main()
