"""A recurrent latent model of brain waves: at each step a posterior and a learned prior.

    pip install rich matplotlib && python examples/recurrent.py

As Dreamer's RSSM and the VRNN (Chung et al. 2015): a GRU carries h; the prior p(z | h) does not see
the step's signal, the posterior q(z | h, x) does. The KLs of all steps are one call. What changes::

    -   kl = kl_divergence(Normal(m, s), Normal(prior_m, prior_s)).sum(-1).clamp(min=1.0).mean()
    +   kl = vaekl.kl_loss(m, s, scale="std", prior=(prior_m, prior_s), batch_dims=2,
    +                      reduction="none").clamp(min=1.0).mean()

The data: the four electrodes of matplotlib's sample EEG, 800 steps. The figure goes on by the prior
alone after 30 steps that were seen.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from matplotlib import cbook
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn
from torch.nn.functional import gaussian_nll_loss, softplus

import vaekl

SEEN, STEPS, FREE = 30, 60, 1.0  # steps, and nats for each that cost nothing


def signals() -> Tensor:
    """Windows [T, B, 4] of the EEG, each electrode of variance 1."""
    path = cbook.get_sample_data("eeg.dat", asfileobj=False)
    eeg = torch.tensor(np.fromfile(path, dtype=float).reshape(800, 4), dtype=torch.float32)
    return ((eeg - eeg.mean(0)) / eeg.std(0)).unfold(0, STEPS, 5).permute(2, 0, 1)


class Recurrent(nn.Module):
    """GRU state h [B, 64], latent z [B, 8]."""

    def __init__(self, size: int = 4, latent: int = 8, hidden: int = 64) -> None:
        super().__init__()
        self.state = nn.Parameter(torch.zeros(hidden))
        self.cell = nn.GRUCell(latent + size, hidden)
        self.prior = nn.Linear(hidden, 2 * latent)
        self.posterior = nn.Linear(hidden + size, 2 * latent)
        self.signal = nn.Linear(hidden + latent, size)
        self.log_variance = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor, seen: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Means of x [T, B, 4], and (m, s, prior_m, prior_s) [T, B, 8] of the steps seen."""
        h, means, gaussians = self.state.expand(x.shape[1], -1), [], []
        for t, step in enumerate(x):
            pair = self.prior(h).chunk(2, dim=-1)
            if t < seen:
                posterior = self.posterior(torch.cat([h, step], dim=-1)).chunk(2, dim=-1)
                gaussians.append((*posterior, *pair))
                pair = posterior
            z = vaekl.reparameterize(pair[0], softplus(pair[1]) + 0.01, scale="std")
            means.append(self.signal(torch.cat([h, z], dim=-1)))
            h = self.cell(torch.cat([z, step if t < seen else means[-1]], dim=-1), h)
        m, raw, prior_m, prior_raw = map(torch.stack, zip(*gaussians))
        scales = (softplus(raw) + 0.01 for raw in (raw, prior_raw))
        return torch.stack(means), (m, next(scales), prior_m, next(scales))

    def loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Nats a step: -log p(x | z, h), and the KL, of which FREE nats cost nothing."""
        means, (m, s, prior_m, prior_s) = self(x, len(x))
        variance = self.log_variance.exp().expand_as(x)
        nll = gaussian_nll_loss(means, x, variance, full=True, reduction="none").sum(-1).mean()
        kl = vaekl.kl_loss(
            m, s, scale="std", prior=(prior_m, prior_s), batch_dims=2, reduction="none"
        )
        return nll, kl.clamp(min=FREE).mean()


def main() -> None:
    """Train on the first windows, print and draw one of the last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--out", default="recurrent.png", help="the figure")
    args = parser.parse_args()
    torch.manual_seed(0)
    windows = signals()
    x, last = windows[:, :-40], windows[:, -1:]
    model = Recurrent()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=args.epochs)
        for _ in range(args.epochs):
            nll, kl = model.loss(x)
            optimizer.zero_grad()
            (nll + kl).backward()
            optimizer.step()
            told = f"-log p {nll:.2f}  KL {kl:.2f} nats a step"
            progress.update(task, advance=1, description=told)
    print(told)
    with torch.no_grad():
        dreams = model(last.expand(-1, 50, -1), SEEN)[0]
    figure = Figure(figsize=(10, 5), layout="constrained")
    for electrode, axes in enumerate(figure.subplots(4, 1, sharex=True)):
        axes.plot(dreams[:, :, electrode].numpy(), color="tab:orange", alpha=0.1)
        axes.plot(last[:, 0, electrode].numpy(), color="tab:blue")
        axes.axvline(SEEN - 0.5, color="0.5", linestyle=":")
        axes.set(ylabel=f"electrode {electrode}", xlim=(0, STEPS - 1))
    axes.set(xlabel=f"step; after {SEEN} the model goes on alone, 50 times (orange)")
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
