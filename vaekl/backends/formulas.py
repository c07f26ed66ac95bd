"""The formulas in torch operations, elementwise ones fit for a part of the elements.

Those of ``vaekl.kernels.forward`` and ``backward``. Differentiable if the phi that they are given
is, and fit for vmap: a batched tensor is never written into one that is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vaekl._roads import is_batched
from vaekl._spec import (
    Gradients,
    Into,
    Needs,
    Operands,
    Outputs,
    Saved,
    Spec,
    compute_dtype,
    kl_denominator,
    sizes,
)

from .forms import FORMS, Bounds, bounded_logvar, clamped_logvar, inner, is_inside
from .prior import Prior, Ratio, prior_of

#: Of some tensors e^l - 1 - l, without cancellation.
Phis = Callable[[list[Tensor]], list[Tensor]]
#: logvar within its bounds, of a form's name and a scale.
Logvar = Callable[[str, Tensor, Bounds], Tensor]


def like(values: Tensor, model: Tensor, dtype: torch.dtype) -> Tensor:
    """values with the memory format and dtype asked for; copied only if they differ."""
    if is_batched(values):
        return values.to(dtype)  # which do not fit a model that is not
    if values.dtype == dtype:
        if values.is_contiguous() and model.is_contiguous():
            return values
        if values.stride() == torch.empty_like(model).stride():
            return values
    return torch.empty_like(model, dtype=dtype).copy_(values)


def _with_axis(number: Tensor) -> Tensor:
    """While torch.jit traces: torch's ONNX exporter makes float32 of numbers without an axis."""
    return number if torch._C._get_tracing_state() is None else number.reshape(1)


def _divide(total: Tensor, denominator: int | Tensor) -> Tensor:
    """A number by a size, which is a tensor while torch.jit traces."""
    if isinstance(denominator, Tensor):
        denominator = denominator.to(total.dtype)
    quotient = _with_axis(total) / denominator
    return quotient if quotient.dim() == total.dim() else quotient.reshape(total.shape)


def shaped(noise: Tensor, mu: Tensor, batch_dims: int) -> Tensor:
    """Noise [B, D] as mu."""
    return noise if mu.dim() == 2 and batch_dims == 1 else noise.view(mu.shape)


def std_of(spec: Spec, s: Tensor, v: Tensor) -> Tensor:
    """Of a scale and its logvar within bounds."""
    direct = FORMS[spec.form].direct
    return _exp_half(v) if direct is None else _inside(spec, s, direct.std, v, _exp_half)


def ratio_of(spec: Spec, v: Tensor, prior: Prior | None) -> Ratio:
    """v less the prior's; of a scale that is no logarithm only where clamp may have to know it."""
    is_direct = FORMS[spec.form].direct is not None
    if prior is None or (is_direct and spec.clamp is None):
        return Ratio(v)
    return Ratio(v - prior.logvar) if is_direct else prior.ratio(v)


def expm1_of(spec: Spec, s: Tensor, v: Tensor, prior: Prior | None) -> Tensor:
    """e^r - 1, r = v less the prior's."""
    direct, ratio = FORMS[spec.form].direct, ratio_of(spec, v, prior)
    if direct is None:
        return ratio.expm1()
    scale = None if prior is None else prior.scale
    return _inside(spec, s, lambda s: direct.expm1(s, scale), ratio.r, torch.expm1)


def _exp_half(v: Tensor) -> Tensor:
    return (0.5 * v).exp_()


def _inside(
    spec: Spec,
    s: Tensor,
    of_scale: Callable[[Tensor], Tensor],
    v: Tensor,
    of_logvar: Callable[[Tensor], Tensor],
) -> Tensor:
    """Of the scale itself, but of logvar where that is at a bound."""
    if spec.clamp is None:
        return of_scale(s)
    within = is_inside(FORMS[spec.form].logvar(s), spec.clamp)
    values = of_scale(inner(spec.form, s, spec.clamp))
    return torch.where(within, values, of_logvar(torch.where(within, 0.0, v)))


def phis_of(
    spec: Spec, s: Tensor, rs: list[Tensor], phi_of_each: Phis, prior: Prior | None = None
) -> list[Tensor]:
    """phi of logvars less the prior's, of which the first is that of the scale s."""
    direct = FORMS[spec.form].direct
    if direct is None:
        return phi_of_each(rs)
    r, *others = rs
    scale = None if prior is None else prior.scale
    first = _inside(spec, s, lambda s: direct.phi(s, scale), r, lambda r: phi_of_each([r])[0])
    return [first, *(phi_of_each(others) if others else [])]


def sample(m: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """z, in the dtype of m."""
    return torch.addcmul(m, std, noise.to(m.dtype))


def means(
    spec: Spec, m: Tensor, v: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Of mu and logvar: [D] each for mean_over="batch", [] for "all"."""
    if spec.mean_over == "all":
        return _with_axis(m.mean(dtype=dtype)), _with_axis(v.mean(dtype=dtype))
    if m.dim() != 2 or spec.batch_dims != 1:  # a view takes as long as any small operation
        shape = sizes(m.shape, spec.batch_dims)
        m, v = m.reshape(shape), v.reshape(shape)
    return m.mean(0, dtype=dtype), v.mean(0, dtype=dtype)


def of_sum(spec: Spec, twice: Tensor, batch: int, event: int) -> Tensor:
    """The KL of all samples, of the sum of 2 KL over all elements, or over all of each place."""
    return _divide(twice, kl_denominator(spec.reduction, batch, event) * 2)


def outputs(
    spec: Spec, x: Operands, dtype: torch.dtype, phi_of_each: Phis, logvar: Logvar = bounded_logvar
) -> tuple[Outputs, Tensor | None]:
    """The outputs in `dtype`, where x has the noise in any, and the means."""
    mu, scale, noise, *_ = x
    batch, event = sizes(mu.shape, spec.batch_dims)
    m, s, prior = mu.to(dtype), scale.to(dtype), prior_of(spec, x)
    v = logvar(spec.form, s, spec.clamp)
    z = kl = of_mean = averages = None
    if spec.sample and noise is not None:
        z = sample(m, std_of(spec, s, v), noise)
    ratios = [] if spec.reduction is None else [ratio_of(spec, v, prior)]
    if spec.mean_over is not None:
        mean_m, mean_v = means(spec, m, v)
        averages = torch.stack([mean_m, mean_v])
        if prior is not None:
            of_event = prior.of_event(spec.mean_over)
            mean_m = of_event.far(mean_m)
        ratios.append(Ratio(mean_v) if prior is None else of_event.ratio(mean_v))
    rs = [ratio.r for ratio in ratios]
    phis = phi_of_each(rs) if spec.reduction is None else phis_of(spec, s, rs, phi_of_each, prior)
    if prior is not None:
        phis = [ratio.corrected(of_each) for ratio, of_each in zip(ratios, phis)]
    if spec.mean_over is not None:
        of_mean = _divide(torch.addcmul(phis.pop(), mean_m, mean_m).sum(), 2)
    if spec.reduction is not None:
        far = m if prior is None else prior.far(m)
        twice = torch.addcmul(phis.pop(), far, far)
        if spec.reduction == "per_dim":
            samples = tuple(range(spec.batch_dims))
            kl = of_sum(spec, twice.sum(samples) if samples else twice, batch, event)
        elif spec.reduction != "none":
            kl = of_sum(spec, twice.sum(), batch, event)
        else:
            if spec.batch_dims < mu.dim():
                twice = twice.sum(tuple(range(spec.batch_dims, mu.dim())))
            kl = twice.mul_(0.5).contiguous()
    return Outputs(z, kl, of_mean), averages


class OfMean(NamedTuple):
    """What kl_of_mean sends to each element."""

    mu: Tensor
    logvar: Tensor
    prior_logvar: Tensor | None = None  # the prior's mean is sent what mu is, negated


class Weights(NamedTuple):
    """Upstream gradients as the gradients of an element take them; each broadcasts against mu."""

    dz: Tensor | None
    kl: Tensor | None = None  # mu and e^logvar - 1 are multiplied by it
    of_mean: OfMean | None = None


def weights(spec: Spec, x: Operands, saved: Saved, upstream: Outputs) -> Weights:
    """Without ``saved.means`` they are taken here, so that they are differentiated."""
    mu, scale, *_ = x
    dz, dkl, dkl_of_mean = upstream
    batch, event = sizes(mu.shape, spec.batch_dims)
    dtype = compute_dtype(*x)
    of_mean = None
    if dkl is not None:
        dkl = dkl.to(dtype) / kl_denominator(spec.reduction, batch, event)
        if spec.reduction == "none":
            dkl = dkl.reshape(dkl.shape + (1,) * (mu.dim() - spec.batch_dims))
    if dkl_of_mean is not None:
        over_batch = spec.mean_over == "batch"
        if saved.means is None:
            logvar = clamped_logvar(spec.form, scale.to(dtype), spec.clamp)
            m, v = means(spec, mu.to(dtype), logvar)
        else:
            m, v = saved.means.unbind()
        h = dkl_of_mean.to(dtype) / (batch if over_batch else batch * event)
        prior = prior_of(spec, x)
        if prior is None:
            found = [h * m, 0.5 * h * torch.expm1(v)]
        else:
            prior = prior.of_event(spec.mean_over)
            far, expm1 = prior.far(m), prior.ratio(v).expm1()
            found = [h * far * prior.root, 0.5 * h * expm1, -0.5 * h * (far * far + expm1)]
        if over_batch and mu.dim() - spec.batch_dims != 1:
            found = [values.reshape(mu.shape[spec.batch_dims :]) for values in found]
        of_mean = OfMean(*found)
    return Weights(dz, dkl, of_mean)


def plus(
    total: Tensor | None, a: Tensor, b: Tensor, value: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """total + value a b, in one pass over memory if there is a total or a is small."""
    if total is not None:
        return torch.addcmul(total, a, b, value=value, out=out)
    return torch.mul(a if value == 1.0 else a * value, b, out=out)


def of_scale(
    spec: Spec, s: Tensor, std: Tensor | None, d_logvar: Tensor | None, to_std: Tensor | None
) -> Tensor | None:
    """The gradient of a scale of that of logvar, and of that of std where it is no logarithm."""
    form = FORMS[spec.form]
    d_scale = None
    if form.direct is not None and to_std is not None and std is not None:
        d_scale = form.direct.std_slope(to_std, std)
    if d_logvar is not None:
        of_logvar = form.slope(d_logvar, inner(spec.form, s, spec.clamp))
        d_scale = of_logvar if d_scale is None else of_logvar + d_scale
    if d_scale is not None and spec.clamp is not None:
        d_scale = torch.where(is_inside(form.logvar(s), spec.clamp), d_scale, 0.0)
    return d_scale


def of_elements(spec: Spec, x: Operands, weights: Weights, out: Into | None = None) -> Gradients:
    """All gradients, of x with its noise, in the compute dtype; the smallest term comes first.

    Those of a prior that samples share are each sample's share. They have the least shape that has
    all that they depend on; that of mu may be dz. `out` is memory for those of mu and scale, which
    are not differentiable then; it is for its owner to see if they are there.
    """
    mu, scale, noise, *_ = x
    form, dtype = FORMS[spec.form], compute_dtype(*x)
    m, s, prior = mu.to(dtype), scale.to(dtype), prior_of(spec, x)
    v = clamped_logvar(spec.form, s, spec.clamp)
    out_mu, out_logvar = out or (None, None)
    d_mu, d_logvar, d_prior_logvar = weights.of_mean or (None, None, None)
    d_prior_mean = d_prior_scale = None
    if prior is not None and d_mu is not None:
        d_prior_mean = -d_mu
    d_eps = std = to_std = None
    if weights.kl is not None:
        slope, expm1 = m, expm1_of(spec, s, v, prior)
        if prior is not None:
            far = prior.far(m)
            slope = far * prior.root
            d_prior_mean = plus(d_prior_mean, weights.kl, slope, -1.0)
            of_both = torch.addcmul(expm1, far, far)
            d_prior_logvar = plus(d_prior_logvar, weights.kl, of_both, -0.5)
        d_mu = plus(d_mu, weights.kl, slope, out=out_mu)
        d_logvar = plus(d_logvar, weights.kl, expm1, 0.5, out_logvar)
    if weights.dz is not None and noise is not None:
        dz, std = weights.dz.to(dtype), std_of(spec, s, v)
        d_eps = dz * std
        d_mu = dz if d_mu is None else torch.add(d_mu, dz, out=out_mu)
        if form.direct is None:
            d_logvar = plus(d_logvar, d_eps, noise.to(dtype), 0.5, out_logvar)
        else:
            to_std = dz * noise.to(dtype)
    d_scale = of_scale(spec, s, std, d_logvar, to_std)
    if prior is not None and d_prior_logvar is not None:
        d_prior_scale = form.slope(d_prior_logvar, prior.scale)
    return Gradients(d_mu, d_scale, d_eps, d_prior_mean, d_prior_scale)


def with_noise(spec: Spec, x: Operands, saved: Saved) -> Operands:
    """The noise that was given or drawn in place of eps."""
    return x if saved.noise is None else x._replace(eps=shaped(saved.noise, x.mu, spec.batch_dims))


def gradients(
    spec: Spec,
    x: Operands,
    saved: Saved,
    upstream: Outputs,
    needs: Needs,
    into: Into | None = None,
) -> Gradients:
    """None where not needed; differentiable unless those of mu and scale are written somewhere."""
    weighed = weights(spec, x, saved, upstream)
    is_theirs = into is not None and into.mu.dtype == compute_dtype(*x)  # partial sums, too
    found = of_elements(spec, with_noise(spec, x, saved), weighed, into if is_theirs else None)
    return of_operands(spec, x, found, upstream.z, needs, into)


def of_operands(
    spec: Spec,
    x: Operands,
    found: Gradients,
    dz: Tensor | None,
    needs: Needs,
    into: Into | None = None,
) -> Gradients:
    """Those of elements as the operands have them: dtype, layout, sums over what is shared."""
    given, targets = [], (*(into or (None, None)), None, None, None)
    for i, (values, model, is_needed, target) in enumerate(zip(found, x, needs, targets)):
        if values is None or model is None or not is_needed:
            values = None
        elif i > 2 and spec.prior == "event":
            samples = tuple(range(spec.batch_dims))
            values = values.expand(x.mu.shape)
            values = (values.sum(samples) if samples else values).to(model.dtype).contiguous()
        elif target is None:
            if values is dz:  # no gradient may be the tensor that came in
                values = values.clone()
            if values.shape != x.mu.shape:
                values = values.expand(x.mu.shape)
            values = like(values, model, model.dtype)
        elif values is not target:
            values = target.copy_(values.expand(x.mu.shape))
        given.append(values)
    return Gradients(*given)
