"""The eager backend: plain torch operations on any device, with the analytic backward.

Same formulas as ``vaekl.kernels.forward`` and ``backward``, several passes over memory. The noise
is torch.randn's, kept for backward; with seed= it is the Philox stream of the other backends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from vaekl.kernels.coefficients import PHI_F64

from ._noise import SEED_OFFSET, philox_normal
from ._options import Options, compute_dtype, kl_denominator, sample_dtype, sizes

Forward = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Backward = tuple[Tensor | None, Tensor | None, Tensor | None]

# PHI_F64's float32 twin: (e^l - 1 - l) / l^2 on |l| <= 1, highest power first, as a minimax fit
# (Lawson on Chebyshev nodes) with relative error 1e-8.
_PHI_F32 = (
    2.77228332379309e-06,
    2.535482963139657e-05,
    0.0001984402333619073,
    0.001388545148074627,
    0.00833331048488617,
    0.04166673496365547,
    0.1666666716337204,
    0.5,
)


def phi(logvar: Tensor) -> Tensor:
    """exp(l) - 1 - l without cancellation: a polynomial for |l| <= 1. Not differentiable."""
    first, second, *rest = PHI_F64 if logvar.dtype == torch.float64 else _PHI_F32
    small = (logvar * first).add_(second)
    for coefficient in rest:
        small.mul_(logvar).add_(coefficient)
    small.mul_(logvar).mul_(logvar)
    return torch.where(logvar.abs() <= 1.0, small, torch.expm1(logvar).sub_(logvar))


def draw_noise(
    like: Tensor,
    batch: int,
    event: int,
    dtype: torch.dtype,
    generator: torch.Generator | None,
    seed: int | None,
) -> Tensor:
    """eps [batch, event] in the compute dtype."""
    if seed is not None:
        return philox_normal(seed, SEED_OFFSET, batch, event, dtype, like.device)
    if generator is None:  # the overload that has one cannot be exported
        return torch.randn(batch, event, dtype=dtype, device=like.device)
    return torch.randn(batch, event, dtype=dtype, device=like.device, generator=generator)


def _means(m: Tensor, v: Tensor, mean_over: str | None) -> Tensor:
    """Batch means of mu and logvar: [2, D] for "batch", [2] for "all"."""
    return torch.stack([m.mean(0), v.mean(0)] if mean_over == "batch" else [m.mean(), v.mean()])


def is_batched(*tensors: Tensor | None) -> bool:
    """May one stand for a batch, in torch.func or by is_grads_batched of torch.autograd.grad?"""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():  # cannot trace what follows
        return False
    return any(tensor is not None and is_legacy_batchedtensor(tensor) for tensor in tensors)


def _like(values: Tensor, model: Tensor, dtype: torch.dtype) -> Tensor:
    """values with the memory format and dtype asked for; copied only if they differ."""
    if is_batched(values):
        return values.to(dtype)  # which do not fit a model that is not
    if values.dtype == dtype and values.stride() == torch.empty_like(model).stride():
        return values
    return torch.empty_like(model, dtype=dtype).copy_(values)


def _divide(total: Tensor, denominator: int | Tensor) -> Tensor:
    """A number by a size, which is a tensor while torch.jit traces."""
    if torch._C._get_tracing_state() is None:
        return total / denominator
    if isinstance(denominator, Tensor):
        denominator = denominator.to(total.dtype)
    # By way of an axis: torch's ONNX exporter makes float32 of numbers that have none.
    return (total.reshape(1) / denominator).reshape(())


def outputs(
    mu: Tensor,
    logvar: Tensor,
    noise: Tensor | None,
    dtype: torch.dtype,
    options: Options,
    phi: Callable[[Tensor], Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(z, kl, kl_of_mean, means) in `dtype`, of noise in any; None for what is not wanted.

    Differentiable if `phi` is, and fit for vmap: a batched tensor is never written into one that
    is not.
    """
    reduction, mean_over, sample, batch_dims, clamp = options
    batch, event = sizes(mu.shape, batch_dims)
    m, v = mu.to(dtype), logvar.to(dtype)
    if clamp is not None:
        v = v.clamp(*clamp)
    z = kl = kl_of_mean = means = None
    if sample and noise is not None:
        z = torch.addcmul(m, (0.5 * v).exp_(), noise.to(dtype))
    if reduction is not None:
        rows = torch.addcmul(phi(v), m, m)
        if batch_dims < mu.dim():
            rows = rows.sum(tuple(range(batch_dims, mu.dim())))
        rows = rows.mul_(0.5)
        if reduction == "none":
            kl = rows.contiguous()
        else:
            kl = _divide(rows.sum(), kl_denominator(reduction, batch, event))
    if mean_over is not None:
        means = _means(m.reshape(batch, event), v.reshape(batch, event), mean_over)
        mean_m, mean_v = means[0].reshape(-1), means[1].reshape(-1)  # an axis, as above
        kl_of_mean = (0.5 * (mean_m * mean_m + phi(mean_v))).sum()
    return z, kl, kl_of_mean, means


def is_between(logvar: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Where clamp has a gradient: between its bounds, of which an infinite one is none."""
    lo, hi = bounds
    if lo == -math.inf:
        return logvar < hi
    return logvar > lo if hi == math.inf else (logvar > lo) & (logvar < hi)


def clamped(logvar: Tensor, bounds: tuple[float, float]) -> Tensor:
    """torch.clamp, with that gradient: torch's own has one at the bounds before 2.14."""
    lo, hi, nan = (logvar.new_full((), value) for value in (*bounds, math.nan))
    outside = torch.where(logvar <= lo, lo, torch.where(logvar >= hi, hi, nan))
    return torch.where(is_between(logvar, bounds), logvar, outside)


def forward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    options: Options,
) -> Forward:
    """(z, kl, kl_of_mean, state, means); state is the noise drawn, [B, D]."""
    dtype = compute_dtype(mu, logvar, eps)
    state, noise = None, eps
    if options.sample and eps is None:
        state = draw_noise(mu, *sizes(mu.shape, options.batch_dims), dtype, generator, seed)
        noise = state.view(mu.shape)
    z, kl, kl_of_mean, means = outputs(mu, logvar, noise, dtype, options, phi)
    if z is not None:
        z = _like(z, mu, sample_dtype(mu, logvar, eps))
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
    into: tuple[Tensor, Tensor] | None = None,
) -> Backward:
    """(dmu, dlogvar, deps), None where not needed; the formulas of ``kernels/backward.py``.

    Made of differentiable operations, unless `into` is given: the first two are written there.
    `means` None: taken here, so that they are differentiated.
    """
    reduction, mean_over, _, batch_dims, clamp = options
    batch, event = sizes(mu.shape, batch_dims)
    dtype = compute_dtype(mu, logvar, eps)
    m, v = mu.to(dtype), logvar.to(dtype)
    bounded = v if clamp is None else clamped(v, clamp)
    of_mu: list[Tensor] = []  # terms to add up
    of_logvar: list[Tensor] = []
    d_eps = None
    noise = eps if state is None else state.view(mu.shape)
    if dz is not None and noise is not None:
        dz = dz.to(dtype)
        d_eps = dz * torch.exp(0.5 * bounded)
        of_mu.append(dz)
        of_logvar.append(d_eps * noise)
    if dkl is not None:
        g = dkl.to(dtype) / kl_denominator(reduction, batch, event)
        if reduction == "none":
            g = g.reshape(g.shape + (1,) * (mu.dim() - batch_dims))
        of_mu.append(g * m)
        of_logvar.append(g * torch.expm1(bounded))
    if dkl_of_mean is not None:
        if means is None:
            means = _means(m.reshape(batch, event), bounded.reshape(batch, event), mean_over)
        over_batch = mean_over == "batch"
        h = dkl_of_mean.to(dtype) / (batch if over_batch else batch * event)
        mean_m, mean_v = means.reshape(2, *mu.shape[batch_dims:]) if over_batch else means
        of_mu.append(h * mean_m)
        of_logvar.append(h * torch.expm1(mean_v))
    if not of_mu:
        return None, None, None
    inside = None if clamp is None else is_between(v, clamp)
    d_mu: Tensor | None = None
    d_logvar: Tensor | None = None
    if into is not None:
        d_mu, d_logvar = into
        _add_into(d_mu, of_mu)
        torch.mul(_total(of_logvar).expand(mu.shape), 0.5, out=d_logvar)
        if inside is not None:
            d_logvar.masked_fill_(~inside, 0.0)
    if needs[0] and d_mu is None:
        d_mu = _total(of_mu)
        # No gradient may be the tensor that came in.
        d_mu = d_mu.clone() if d_mu is dz else d_mu.expand(mu.shape)
        d_mu = _like(d_mu, mu, mu.dtype)
    if needs[1] and d_logvar is None:
        d_logvar = 0.5 * _total(of_logvar)
        if inside is not None:
            d_logvar = torch.where(inside, d_logvar, 0.0)
        d_logvar = _like(d_logvar.expand(mu.shape), logvar, logvar.dtype)
    if not needs[2] or d_eps is None or eps is None:
        return d_mu, d_logvar, None
    return d_mu, d_logvar, _like(d_eps, eps, eps.dtype)


def plan_forward(
    mu: Tensor, logvar: Tensor, eps: Tensor | None, options: Options
) -> Callable[..., Forward]:
    """forward of these options: nothing is worth working out beforehand."""
    return lambda mu, logvar, eps, generator, seed: forward(
        mu, logvar, eps, generator, seed, options
    )


def plan_backward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    dz: Tensor | None,
    dkl: Tensor | None,
    options: Options,
    needs: tuple[bool, bool, bool],
    into: tuple[Tensor, Tensor] | None,
) -> Callable[..., Backward]:
    """backward of these options."""
    return partial(backward, options=options, needs=needs)


def _total(terms: list[Tensor]) -> Tensor:
    """Their sum; the first itself if it is alone."""
    return sum(terms[1:], terms[0])


def _add_into(out: Tensor, terms: list[Tensor]) -> None:
    """Write their sum, with no tensor for it in between."""
    if len(terms) == 1:
        out.copy_(terms[0])
    else:
        torch.add(_total(terms[:-1]), terms[-1], out=out)
