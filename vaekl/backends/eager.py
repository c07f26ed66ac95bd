"""The eager backend: plain torch operations on any device, with the analytic backward.

Same formulas as ``vaekl.kernels.forward`` and ``backward``, several passes over memory. The noise
is torch.randn's, kept for backward; with seed= it is the Philox stream of the other backends.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vaekl._noise import SEED_OFFSET, philox_normal
from vaekl._roads import is_batched
from vaekl._spec import (
    LOGVAR_RANGE,
    Gradients,
    Into,
    Key,
    Needs,
    Operands,
    Outputs,
    Saved,
    Source,
    Spec,
    compute_dtype,
    kl_denominator,
    sample_dtype,
    sizes,
)
from vaekl.kernels.coefficients import PHI_F64

from .forms import FORMS
from .protocol import Backward, Forward

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


def draw_noise(spec: Spec, x: Operands, source: Source) -> Tensor:
    """eps [B, D] in the compute dtype."""
    shape, device = sizes(x.mu.shape, spec.batch_dims), x.mu.device
    dtype, (generator, seed) = compute_dtype(*x), source
    if seed is not None:
        return philox_normal(Key(seed, SEED_OFFSET), shape, dtype, device)
    if generator is None:  # the overload that has one cannot be exported
        return torch.randn(shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=dtype, device=device, generator=generator)


def _means(m: Tensor, v: Tensor, mean_over: str | None) -> Tensor:
    """Batch means of mu and logvar: [2, D] for "batch", [2] for "all"."""
    return torch.stack([m.mean(0), v.mean(0)] if mean_over == "batch" else [m.mean(), v.mean()])


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
    spec: Spec, x: Operands, dtype: torch.dtype, phi_of: Callable[[Tensor], Tensor]
) -> tuple[Outputs, Tensor | None]:
    """The outputs in `dtype`, where x has the noise in any, and the means.

    Differentiable if `phi_of` is, and fit for vmap: a batched tensor is never written into one that
    is not.
    """
    mu, scale, noise = x
    batch, event = sizes(mu.shape, spec.batch_dims)
    m, v = mu.to(dtype), FORMS[spec.form].values(scale.to(dtype), spec.clamp)
    z = kl = kl_of_mean = means = None
    if spec.sample and noise is not None:
        z = torch.addcmul(m, (0.5 * v).exp_(), noise.to(dtype))
    if spec.reduction is not None:
        rows = torch.addcmul(phi_of(v), m, m)
        if spec.batch_dims < mu.dim():
            rows = rows.sum(tuple(range(spec.batch_dims, mu.dim())))
        rows = rows.mul_(0.5)
        if spec.reduction == "none":
            kl = rows.contiguous()
        else:
            kl = _divide(rows.sum(), kl_denominator(spec.reduction, batch, event))
    if spec.mean_over is not None:
        means = _means(m.reshape(batch, event), v.reshape(batch, event), spec.mean_over)
        mean_m, mean_v = means[0].reshape(-1), means[1].reshape(-1)  # an axis, as above
        kl_of_mean = (0.5 * (mean_m * mean_m + phi_of(mean_v))).sum()
    return Outputs(z, kl, kl_of_mean), means


def gradients(
    spec: Spec,
    x: Operands,
    saved: Saved,
    upstream: Outputs,
    needs: Needs,
    into: Into | None = None,
) -> Gradients:
    """None where not needed; the formulas of ``kernels/backward.py``.

    Made of differentiable operations, unless `into` is given, where the first two are written.
    Without ``saved.means`` the means are taken here, so that they are differentiated.
    """
    mu, scale, eps = x
    dz, dkl, dkl_of_mean = upstream
    batch, event = sizes(mu.shape, spec.batch_dims)
    dtype, form = compute_dtype(*x), FORMS[spec.form]
    m, s = mu.to(dtype), scale.to(dtype)
    v = form.logvar(s, spec.clamp)
    of_mu: list[Tensor] = []  # terms to add up
    of_logvar: list[Tensor] = []  # twice that
    d_eps = None
    noise = eps if saved.noise is None else saved.noise.view(mu.shape)
    if dz is not None and noise is not None:
        dz = dz.to(dtype)
        d_eps = dz * torch.exp(0.5 * v)
        of_mu.append(dz)
        of_logvar.append(d_eps * noise)
    if dkl is not None:
        g = dkl.to(dtype) / kl_denominator(spec.reduction, batch, event)
        if spec.reduction == "none":
            g = g.reshape(g.shape + (1,) * (mu.dim() - spec.batch_dims))
        of_mu.append(g * m)
        of_logvar.append(g * torch.expm1(v))
    if dkl_of_mean is not None:
        means, over_batch = saved.means, spec.mean_over == "batch"
        if means is None:
            means = _means(m.reshape(batch, event), v.reshape(batch, event), spec.mean_over)
        h = dkl_of_mean.to(dtype) / (batch if over_batch else batch * event)
        mean_m, mean_v = means.reshape(2, *mu.shape[spec.batch_dims :]) if over_batch else means
        of_mu.append(h * mean_m)
        of_logvar.append(h * torch.expm1(mean_v))
    if not of_mu:
        return Gradients()
    d_mu: Tensor | None = None
    d_scale: Tensor | None = None
    if into is not None:
        d_mu, d_scale = into
        _add_into(d_mu, of_mu)
        twice = form.gradient(_total(of_logvar), s, spec.clamp)
        torch.mul(twice.expand(mu.shape), 0.5, out=d_scale)
    if needs.mu and d_mu is None:
        d_mu = _total(of_mu)
        # No gradient may be the tensor that came in.
        d_mu = d_mu.clone() if d_mu is dz else d_mu.expand(mu.shape)
        d_mu = _like(d_mu, mu, mu.dtype)
    if needs.scale and d_scale is None:
        d_scale = form.gradient(0.5 * _total(of_logvar), s, spec.clamp)
        d_scale = _like(d_scale.expand(mu.shape), scale, scale.dtype)
    if not needs.eps or d_eps is None or eps is None:
        return Gradients(d_mu, d_scale)
    return Gradients(d_mu, d_scale, _like(d_eps, eps, eps.dtype))


def _total(terms: list[Tensor]) -> Tensor:
    """Their sum; the first itself if it is alone."""
    return sum(terms[1:], terms[0])


def _add_into(out: Tensor, terms: list[Tensor]) -> None:
    """Write their sum, with no tensor for it in between."""
    if len(terms) == 1:
        out.copy_(terms[0])
    else:
        torch.add(_total(terms[:-1]), terms[-1], out=out)


def why_not(device: str) -> str | None:
    """Nothing."""
    return None


def forward(spec: Spec, like: Operands) -> Forward:
    """Nothing is worth working out beforehand."""

    def run(x: Operands, source: Source) -> tuple[Outputs, Saved]:
        drawn = None
        given = x
        if spec.sample and x.eps is None:
            drawn = draw_noise(spec, x, source)
            given = Operands(x.mu, x.scale, drawn.view(x.mu.shape))
        (z, kl, kl_of_mean), means = outputs(spec, given, compute_dtype(*x), phi)
        if z is not None:
            z = _like(z, x.mu, sample_dtype(*x))
        return Outputs(z, kl, kl_of_mean), Saved(None, means, drawn)

    return run


def backward(
    spec: Spec, like: Operands, upstream: Outputs, needs: Needs, into: Into | None
) -> Backward:
    """``gradients`` of these."""
    return lambda x, saved, upstream, into: gradients(spec, x, saved, upstream, needs, into)


_CHUNK = 2**20  # elements that are widened to float64 at a time


def statistics(mu: Tensor, logvar: Tensor, batch_dims: int) -> Tensor:
    """The rows of ``diagnostics.statistics.ROWS``, float64 [9, D]."""
    batch, event = sizes(mu.shape, batch_dims)
    if mu.device.type not in ("cpu", "cuda"):  # some have no float64
        mu, logvar = mu.cpu(), logvar.cpu()
    rows = max(_CHUNK // event, 1)
    shift = mu.reshape(batch, event)[:1].double()
    low, high = LOGVAR_RANGE
    total = torch.zeros(8, event, dtype=torch.float64, device=mu.device)
    for m, v in zip(mu.reshape(batch, event).split(rows), logvar.reshape(batch, event).split(rows)):
        m, v = m.double(), v.double()
        finite = v.isfinite()
        shifted, outside = m - shift, finite & ((v < low) | (v > high))
        terms = (shifted, shifted * shifted, v, v.exp(), phi(v), ~m.isfinite(), ~finite, outside)
        # Not in place: under vmap the terms may be batched, total is not yet.
        total = total + torch.stack([term.sum(0, dtype=torch.float64) for term in terms])
    return torch.cat([total, shift])
