"""A count model with a Gaussian latent, in the style of scvi-tools, on the digits' counts.

    pip install scikit-learn rich && python examples/count_model.py

scvi-tools' encoders give a mean and a variance, ``exp(x) + 1e-4``. What changes is the line that
makes a distribution of them, samples it and takes its KL::

    -   qz = Normal(mean, variance.sqrt())
    -   z = qz.rsample()
    -   kl = kl_divergence(qz, Normal(0, 1)).sum(dim=-1).mean()
    +   z, kl, kl_of_mean = vaekl.reparameterize_kl(mean, variance.log())

The data: scikit-learn's 8x8 digits, whose pixels are counts in 0..16 (of 4x4 binary dots each),
taken for a cell's transcripts of 64 genes. The decoder gives the share of each gene; counts are
negative binomial around share times library size, with one dispersion a gene.
"""

from __future__ import annotations

import argparse

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from torch import Tensor, nn

import vaekl


def layers(inputs: int, outputs: int, hidden: int = 128) -> nn.Sequential:
    """One hidden layer, normalised over the batch."""
    first = nn.Linear(inputs, hidden)
    return nn.Sequential(first, nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class CountModel(nn.Module):
    """From counts [B, genes] to a latent of 10 and back."""

    def __init__(self, genes: int, latent: int = 10) -> None:
        super().__init__()
        self.encoder = layers(genes, 2 * latent)
        self.decoder = layers(latent, genes)
        self.log_dispersion = nn.Parameter(torch.zeros(genes))

    def encode(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the posterior, each [B, latent]."""
        mean, raw = self.encoder(torch.log1p(counts)).chunk(2, dim=-1)
        return mean, torch.exp(raw) + 1e-4

    def forward(self, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Averages over the batch in nats: -log p(counts | z), the KL, the KL of the mean."""
        mean, variance = self.encode(counts)
        z, kl, kl_of_mean = vaekl.reparameterize_kl(mean, variance.log())
        rate = torch.softmax(self.decoder(z), dim=-1) * counts.sum(-1, keepdim=True)
        dispersion = self.log_dispersion.exp()
        likelihood = torch.distributions.NegativeBinomial(
            dispersion, logits=torch.log(rate + 1e-8) - self.log_dispersion, validate_args=False
        )
        return -likelihood.log_prob(counts).sum(-1).mean(), kl, kl_of_mean


def main() -> None:
    """Train, and see what the codes know of the digits that they were not told."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    args = parser.parse_args()
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    counts = torch.tensor(pixels, dtype=torch.float32)
    model = CountModel(counts.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    columns = (TextColumn("{task.description:<60}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=args.epochs)
        for epoch in range(args.epochs):
            warm_up = min(1.0, (epoch + 1) / 20)
            for batch in counts[torch.randperm(len(counts))].split(128):
                nll, kl, kl_of_mean = model(batch)
                loss = nll + warm_up * kl
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            told = f"-log p {nll:.1f}  KL {kl:.2f}  KL of mean {kl_of_mean:.2f} nats"
            progress.update(task, advance=1, description=told)
    print(told)
    with torch.no_grad():
        codes = model.eval().encode(counts)[0].numpy()
    accuracy = cross_val_score(LogisticRegression(max_iter=1000), codes, digits).mean()
    print(f"digits read off the codes by logistic regression: {accuracy:.1%}")


if __name__ == "__main__":
    main()
