"""The eager backend: plain torch operations on any device, with the analytic backward.

Same formulas as ``vaekl.kernels.forward`` and ``backward``, several passes over memory. The noise
is torch.randn's, kept for backward; with seed= it is the Philox stream of the other backends.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._options import Options, compute_dtype, kl_denominator, sample_dtype, sizes

Forward = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Backward = tuple[Tensor | None, Tensor | None, Tensor | None]

_PHI_SERIES = tuple(1.0 / math.factorial(k + 2) for k in range(16, -1, -1))
_WORD = 0xFFFFFFFF


def phi(logvar: Tensor) -> Tensor:
    """exp(l) - 1 - l without cancellation: a series for |l| <= 1."""
    # In float32 the terms past l^10 / 10! are below rounding.
    terms = _PHI_SERIES if logvar.dtype == torch.float64 else _PHI_SERIES[-10:]
    series = torch.full_like(logvar, terms[0])
    for term in terms[1:]:
        series = series * logvar + term
    return torch.where(logvar.abs() <= 1.0, series * logvar * logvar, torch.expm1(logvar) - logvar)


def philox_normal(
    seed: int | Tensor,
    offset: int | Tensor,
    batch: int,
    event: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """eps [batch, event] of the key: the noise contract in torch integer arithmetic."""
    groups = -(-event // 4)
    group = torch.arange(batch * groups, device=device)
    zero = torch.zeros_like(group)
    counter = offset >> 2
    c = [
        zero + (counter & _WORD),
        zero + (counter >> 32 & _WORD),
        group & _WORD,
        group >> 32 & _WORD,
    ]
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # Products wrap in int64, which leaves all 64 bits right; >> is masked to be unsigned.
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (p1 >> 32 & _WORD) ^ c[1] ^ k0,
            p1 & _WORD,
            (p0 >> 32 & _WORD) ^ c[3] ^ k1,
            p0 & _WORD,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    lanes = []
    for radius_word, angle_word in ((c[0], c[1]), (c[2], c[3])):
        uniform = (radius_word.double() + 0.5) * 2.0**-32
        radius = torch.sqrt(-2.0 * torch.log(uniform))
        angle = angle_word.double() * (2.0 * math.pi * 2.0**-32)
        lanes += [radius * torch.cos(angle), radius * torch.sin(angle)]
    normals = torch.stack(lanes, dim=-1).reshape(batch, groups * 4)
    return normals[:, :event].to(dtype)


def _noise(
    like: Tensor,
    batch: int,
    event: int,
    dtype: torch.dtype,
    generator: torch.Generator | None,
    seed: int | None,
) -> Tensor:
    if seed is not None:
        return philox_normal(seed, 0, batch, event, dtype, like.device)
    return torch.randn(batch, event, dtype=dtype, device=like.device, generator=generator)


def _means(m: Tensor, v: Tensor, mean_over: str | None) -> Tensor:
    """Batch means of mu and logvar: [2, D] for "batch", [2] for "all"."""
    return torch.stack([m.mean(0), v.mean(0)] if mean_over == "batch" else [m.mean(), v.mean()])


def forward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    options: Options,
) -> Forward:
    """(z, kl, kl_of_mean, state, means); state is the noise drawn, [B, D]."""
    reduction, mean_over, sample, batch_dims, clamp = options
    batch, event = sizes(mu.shape, batch_dims)
    dtype = compute_dtype(mu, logvar, eps)
    m = mu.to(dtype).reshape(batch, event)
    v = logvar.to(dtype).reshape(batch, event)
    if clamp is not None:
        v = v.clamp(*clamp)
    z = kl = kl_of_mean = state = means = None
    if sample:
        if eps is None:
            state = _noise(mu, batch, event, dtype, generator, seed)
            noise = state
        else:
            noise = eps.to(dtype).reshape(batch, event)
        z = torch.empty_like(mu, dtype=sample_dtype(mu, logvar, eps))
        z.copy_((m + torch.exp(0.5 * v) * noise).view(mu.shape))
    if reduction is not None:
        rows = 0.5 * (m * m + phi(v)).sum(1)
        if reduction == "none":
            kl = rows.view(mu.shape[:batch_dims])
        else:
            kl = rows.sum() / kl_denominator(reduction, batch, event)
    if mean_over is not None:
        means = _means(m, v, mean_over)
        kl_of_mean = 0.5 * (means[0] * means[0] + phi(means[1])).sum()
    return z, kl, kl_of_mean, state, means


def backward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    dz: Tensor | None,
    dkl: Tensor | None,
    dkl_of_mean: Tensor | None,
    state: Tensor | None,
    means: Tensor | None,
    options: Options,
    needs: tuple[bool, bool, bool],
) -> Backward:
    """(dmu, dlogvar, deps), None where not needed; the formulas of ``kernels/backward.py``.

    Made of differentiable operations. `means` None: taken here, so that they are differentiated.
    """
    reduction, mean_over, _, batch_dims, clamp = options
    batch, event = sizes(mu.shape, batch_dims)
    dtype = compute_dtype(mu, logvar, eps)
    m = mu.to(dtype).reshape(batch, event)
    v = logvar.to(dtype).reshape(batch, event)
    clamped = v if clamp is None else v.clamp(*clamp)
    std = torch.exp(0.5 * clamped)
    d_mu = torch.zeros_like(v)
    d_logvar = torch.zeros_like(v)
    noise = state if eps is None else eps.to(dtype).reshape(batch, event)
    if dz is not None and noise is not None:
        dz = dz.to(dtype).reshape(batch, event)
        d_mu = d_mu + dz
        d_logvar = d_logvar + dz * (std * noise)
    if dkl is not None:
        g = dkl.to(dtype).reshape(-1, 1) / kl_denominator(reduction, batch, event)
        d_mu = d_mu + g * m
        d_logvar = d_logvar + g * torch.expm1(clamped)
    if dkl_of_mean is not None:
        if means is None:
            means = _means(m, clamped, mean_over)
        h = dkl_of_mean.to(dtype) / (batch if mean_over == "batch" else batch * event)
        d_mu = d_mu + h * means[0]
        d_logvar = d_logvar + h * torch.expm1(means[1])
    d_logvar = 0.5 * d_logvar
    if clamp is not None:
        d_logvar = torch.where((v >= clamp[0]) & (v <= clamp[1]), d_logvar, 0.0)
    d_eps = dz * std if dz is not None else None
    results: list[Tensor | None] = []
    for gradient, like, needed in zip((d_mu, d_logvar, d_eps), (mu, logvar, eps), needs):
        if not needed or gradient is None or like is None:
            results.append(None)
        else:
            results.append(torch.empty_like(like).copy_(gradient.view(like.shape)))
    return results[0], results[1], results[2]
