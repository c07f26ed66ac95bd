"""The eager backend: plain torch operations on any device, with the analytic backward.

The noise is torch.randn's, kept for backward; with seed= it is the Philox stream of the other
backends. On a CPU a large tensor is worked on block by block: what one operation writes, the next
finds in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vaekl._noise import SEED_OFFSET, philox_normal
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
    has_float64,
    kl_shape,
    needed,
    sample_dtype,
    sizes,
)
from vaekl.kernels.coefficients import PHI_F64

from . import densities, formulas
from .forms import bounded_logvar
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


# Inside of this the square below has all digits that float32 has, outside float64's exp.
_SEAM = 2.0**-12


def _within(x: Tensor, bound: float) -> Tensor:
    """x where |x| < bound, else 0: where() in one pass, which torch vectorizes on a CPU."""
    within: Tensor = torch.ops.aten.hardtanh_backward.default(x, x, -bound, bound)
    return within


def phi(logvar: Tensor) -> Tensor:
    """exp(l) - 1 - l without cancellation. Not differentiable."""
    if logvar.dtype == torch.float32 and has_float64(logvar.device):
        small = _within(logvar, _SEAM)
        large = (logvar - small).double()
        values = torch.exp(large).sub_(large).sub_(1.0).to(torch.float32)
        root = torch.addcmul(small, small, small, value=1 / 6)  # root^2 / 2 = l^2/2 + l^3/6 + ...
        return values.addcmul_(root, root, value=0.5)
    first, second, *rest = PHI_F64 if logvar.dtype == torch.float64 else _PHI_F32
    small = _within(logvar, 1.0)
    large = logvar - small
    values = (small * first).add_(second)
    for coefficient in rest:
        values.mul_(small).add_(coefficient)
    return values.mul_(small).mul_(small).add_(torch.expm1(large).sub_(large))


def phi_of_each(logvars: list[Tensor]) -> list[Tensor]:
    """Small ones in one go: the number of operations is what takes their time."""
    if len(logvars) < 2 or logvars[0].numel() > _SMALL:
        return [phi(v) for v in logvars]
    flat = [v if v.dim() == 1 else v.reshape(-1) for v in logvars]
    parts = phi(torch.cat(flat)).split_with_sizes([v.numel() for v in logvars])
    return [part if v.dim() == 1 else part.view(v.shape) for part, v in zip(parts, logvars)]


def draw_noise(spec: Spec, x: Operands, source: Source) -> Tensor:
    """eps [B, D] in the compute dtype."""
    shape, device = sizes(x.mu.shape, spec.batch_dims), x.mu.device
    dtype, (generator, seed, samples, kind) = compute_dtype(*x), source
    if seed is not None or samples is not None:
        return philox_normal(Key(seed or 0, SEED_OFFSET), shape, dtype, device, samples, kind)
    if generator is None:  # the overload that has one cannot be exported
        return torch.randn(shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=dtype, device=device, generator=generator)


def why_not(device: str) -> str | None:
    """Nothing."""
    return None


#: Elements that are worth a copy to spare operations.
_SMALL = 2**14
#: Elements of a block, for each thread. With fewer, the operations themselves take longer than
#: memory does.
_BLOCK = 2**17


def _block() -> int:
    return _BLOCK * torch.get_num_threads()


def _blocks(batch: int, event: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of parts of a [batch, event]."""
    size = _block()
    rows, columns = max(size // event, 1), min(size, event)
    for row in range(0, batch, rows):
        for column in range(0, event, columns):
            yield slice(row, row + rows), slice(column, column + columns)


def _flat(batch: int, event: int, *tensors: Tensor | None) -> list[Any] | None:
    """Views [B, D], if the strides of all tensors allow one."""
    try:
        return [None if t is None else t.view(batch, event) for t in tensors]
    except RuntimeError:
        return None


def _part(values: Tensor | None, row: slice, column: slice) -> Any:
    """A block's, of what broadcasts against [B, D]."""
    if values is None or values.dim() == 0:
        return values
    if values.dim() == 1:
        return values[column]
    return values[row] if values.shape[1] == 1 else values[row, column]


def _is_large(x: Operands) -> bool:
    """Is it worked on in blocks? (Not against a prior.)"""
    is_large: bool = x.mu.numel() > _block()
    return is_large and x.mu.device.type == "cpu" and x.prior_mean is None


def _forward_in_blocks(
    spec: Spec, x: Operands, z_dtype: torch.dtype
) -> tuple[Outputs, Tensor | None] | None:
    """``formulas.outputs``; None where there are no such views."""
    z = torch.empty_like(x.mu, dtype=z_dtype) if spec.sample else None
    batch, event = sizes(x.mu.shape, spec.batch_dims)
    flat = _flat(batch, event, *x[:3], z)
    if flat is None:
        return None
    mu, scale, noise, z_flat = flat
    dtype, per_sample = compute_dtype(*x), spec.reduction == "none"

    def logvar(part: Tensor) -> Tensor:
        return bounded_logvar(spec.form, part, spec.clamp)

    twice = torch.zeros(kl_shape(spec, x.mu.shape), dtype=torch.float64, device=x.mu.device)
    by_place = twice.view(-1)
    for row, column in _blocks(batch, event):
        m, s = mu[row, column].to(dtype), scale[row, column].to(dtype)
        v = logvar(s)
        if z_flat is not None:
            z_flat[row, column] = formulas.sample(
                m, formulas.std_of(spec, s, v), noise[row, column]
            )
        if spec.reduction is not None:
            (of_element,) = formulas.phis_of(spec, s, [v], phi_of_each)
            terms = torch.addcmul(of_element, m, m)
            if per_sample:
                by_place[row] += terms.sum(1)
            elif spec.reduction == "per_dim":
                by_place[column] += terms.sum(0)
            else:
                twice += terms.sum()
    kl = kl_of_mean = means = None
    if per_sample:
        kl = (0.5 * twice).to(dtype)
    elif spec.reduction is not None:
        kl = formulas.of_sum(spec, twice, batch, event).to(dtype)
    if spec.mean_over is not None:
        v = scale if spec.form == "logvar" and spec.clamp is None else logvar(scale.to(dtype))
        found = formulas.means(spec._replace(batch_dims=1), mu, v, dtype)
        means = torch.stack(found)
        halves = (mean.reshape(-1).split(_block()) for mean in found)
        parts = [torch.addcmul(phi(v), m, m).sum() for m, v in zip(*halves)]
        kl_of_mean = torch.stack(parts).sum() * 0.5
    return Outputs(z, kl, kl_of_mean), means


def forward(spec: Spec, like: Operands) -> Forward:
    """Nothing is worth working out beforehand."""

    def run(x: Operands, source: Source) -> tuple[Outputs, Saved]:
        drawn, z_dtype = None, sample_dtype(*x[:3])
        dtype = compute_dtype(*x)
        if spec.sample and x.eps is None:
            drawn = draw_noise(spec, x, source)
            x = x._replace(eps=formulas.shaped(drawn, x.mu, spec.batch_dims))
        found: tuple[Outputs, Tensor | None] | None
        if spec.log_prob is not None:
            found = densities.outputs(spec, x, dtype), None
        else:
            found = _forward_in_blocks(spec, x, z_dtype) if _is_large(x) else None
        if found is None:
            found = formulas.outputs(spec, x, dtype, phi_of_each)
        outputs, means = found
        if outputs.z is not None:
            outputs = outputs._replace(z=formulas.like(outputs.z, x.mu, z_dtype))
        return outputs, Saved(None, means, drawn)

    return run


def _backward_in_blocks(
    spec: Spec, x: Operands, saved: Saved, upstream: Outputs, out: Gradients
) -> Gradients | None:
    """``formulas.gradients`` of x with its noise, in `out`; None where there are no such views."""
    batch, event = sizes(x.mu.shape, spec.batch_dims)
    flat = _flat(batch, event, *x[:3], upstream.z, *out[:3])
    if flat is None:
        return None
    mu, scale, noise, dz, *targets = flat
    x = Operands(mu, scale, noise)
    if spec.reduction == "none" and upstream.kl is not None:
        upstream = upstream._replace(kl=upstream.kl.reshape(batch))
    elif spec.reduction == "per_dim" and upstream.kl is not None:
        upstream = upstream._replace(kl=upstream.kl.reshape(event))
    spec = spec._replace(batch_dims=1)
    _, of_kl, of_mean = formulas.weights(spec, x, saved, upstream)
    of_mu, of_logvar, _ = of_mean or (None, None, None)
    for block in _blocks(batch, event):
        mu, scale, noise, of_z, kl, m, v = [
            _part(values, *block) for values in (*x[:3], dz, of_kl, of_mu, of_logvar)
        ]
        of_means = None if of_mean is None else formulas.OfMean(m, v)
        weights = formulas.Weights(of_z, kl, of_means)
        found = formulas.of_elements(spec, Operands(mu, scale, noise), weights)
        for target, values in zip(targets, found):
            if target is not None:
                target[block] = values
    return out


def backward(
    spec: Spec, like: Operands, upstream: Outputs, needs: Needs, into: Into | None
) -> Backward:
    """``formulas.gradients`` of these."""
    needs = needed(spec, needs, upstream)

    def run(x: Operands, saved: Saved, upstream: Outputs, into: Into | None) -> Gradients:
        if spec.log_prob is not None:
            return densities.gradients(spec, x, saved, upstream, needs)
        x, found = formulas.with_noise(spec, x, saved), None
        if _is_large(x):
            out = [torch.empty_like(t) if n and t is not None else None for t, n in zip(x, needs)]
            if into is not None:
                out[:2] = into
            found = _backward_in_blocks(spec, x, saved, upstream, Gradients(*out))
        if found is None:
            found = formulas.gradients(spec, x, saved, upstream, needs, into)
        return found

    return run


_CHUNK = 2**20  # elements that are widened to float64 at a time


def statistics(mu: Tensor, logvar: Tensor, batch_dims: int) -> Tensor:
    """The rows of ``diagnostics.statistics.ROWS``, float64 [9, D]."""
    batch, event = sizes(mu.shape, batch_dims)
    if not has_float64(mu.device):
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
