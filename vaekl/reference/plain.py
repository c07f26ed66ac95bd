"""The plain torch code that users have today."""

from __future__ import annotations

import torch
from torch import Tensor


def torch_reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None = None,
    *,
    reduction: str = "batchmean",
    mean_over: str = "batch",
    batch_dims: int = 1,
    clamp: tuple[float, float] | None = None,
    scale: str = "logvar",
) -> tuple[Tensor, Tensor, Tensor]:
    """(z, kl, kl_of_mean) as people write them today: plain torch, autograd, the input's dtype."""
    given = logvar
    if scale != "logvar":
        logvar = 2 * given if scale == "log_std" else given.log() * (2 if scale == "std" else 1)
    if clamp is not None:
        logvar = torch.clamp(logvar, *clamp)
    std = torch.exp(0.5 * logvar)
    if clamp is None and scale in ("std", "var"):
        std = given if scale == "std" else given.sqrt()
    z = mu + std * (torch.randn_like(std) if eps is None else eps)

    def elements(m: Tensor, v: Tensor) -> Tensor:
        return -0.5 * (1 + v - m.pow(2) - v.exp())

    rows = elements(mu, logvar)
    if batch_dims < mu.dim():
        rows = rows.flatten(batch_dims).sum(-1)
    kl = {
        "none": lambda: rows,
        "sum": lambda: rows.sum(),
        "batchmean": lambda: rows.mean(),
        "mean": lambda: elements(mu, logvar).mean(),
        "per_dim": lambda: (
            elements(mu, logvar).flatten(0, batch_dims - 1).mean(0)
            if batch_dims
            else elements(mu, logvar)
        ),
    }[reduction]()
    if mean_over == "batch":
        if batch_dims:  # no axes at all would be every axis to torch
            axes = tuple(range(batch_dims))
            mu, logvar = mu.mean(axes), logvar.mean(axes)
        of_mean = elements(mu, logvar).sum()
    else:
        of_mean = elements(mu.mean(), logvar.mean())
    return z, kl, of_mean
