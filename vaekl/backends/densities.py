"""A sample with its log densities in torch operations: the formulas of ``vaekl.kernels.log_prob``.

Differentiable any number of times; along the path what log q holds is a constant to all of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vaekl._spec import Gradients, Needs, Operands, Outputs, Saved, Spec, compute_dtype

from . import formulas
from .forms import FORMS, clamped_logvar
from .prior import Prior, prior_of

LN_2_PI = math.log(2 * math.pi)


class _Parts(NamedTuple):
    """What densities and their gradients are of, in the compute dtype."""

    m: Tensor
    s: Tensor
    eps: Tensor
    v: Tensor  # logvar within its bounds
    std: Tensor
    prior: Prior | None


def _parts(spec: Spec, x: Operands, dtype: torch.dtype) -> _Parts:
    mu, scale, noise, *_ = x
    if noise is None:
        raise RuntimeError("log densities are of a noise that is there")
    m, s, eps = mu.to(dtype), scale.to(dtype), noise.to(dtype)
    v = clamped_logvar(spec.form, s, spec.clamp)
    return _Parts(m, s, eps, v, formulas.std_of(spec, s, v), prior_of(spec, x))


def outputs(spec: Spec, x: Operands, dtype: torch.dtype, is_composed: bool = False) -> Outputs:
    """z, log q and log p in `dtype`, where x has the noise in any.

    is_composed: torch differentiates what is done here.
    """
    mu, (m, _, eps, v, std, prior) = x.mu, _parts(spec, x, dtype)
    z = formulas.sample(m, std, eps)
    if is_composed and spec.log_prob == "path":
        # d log q / dz = -eps / std, with eps and std held; the path's own value is 0, or of
        # infinities NaN.
        path = 2.0 * (eps / std).detach() * (z - z.detach())
        of_q = v.detach() + eps.detach().square() + torch.where(path == 0.0, path, 0.0)
    else:
        of_q = v + eps.square()
    if prior is None:
        of_p = z.square()
    else:
        of_p = prior.far(z).square() + prior.logvar
    axes = tuple(range(spec.batch_dims, mu.dim()))
    both = [-0.5 * (t + LN_2_PI).expand(mu.shape) for t in (of_q, of_p)]
    return Outputs(z, *((t.sum(axes) if axes else t).contiguous() for t in both))


def gradients(spec: Spec, x: Operands, saved: Saved, upstream: Outputs, needs: Needs) -> Gradients:
    """None where not needed."""
    mu, form, dtype = x.mu, FORMS[spec.form], compute_dtype(*x)
    m, s, eps, _, std, prior = _parts(spec, formulas.with_noise(spec, x, saved), dtype)
    dz, *of_rows = upstream
    of_q, of_p = (
        None if t is None else t.to(dtype).reshape(t.shape + (1,) * (mu.dim() - t.dim()))
        for t in of_rows
    )
    has_z = dz is not None or of_p is not None or spec.log_prob == "path"
    to_z = torch.zeros_like(m) if dz is None else dz.to(dtype)
    d_prior_mean = d_prior_scale = None
    if of_p is not None:
        z = formulas.sample(m, std, eps)
        far = z if prior is None else prior.far(z)
        pull = of_p * far
        if prior is not None:
            d_prior_mean = pull = pull * prior.root
            d_prior_scale = form.slope(0.5 * of_p * (far * far - 1.0), prior.scale)
        to_z = to_z - pull
    if of_q is not None and spec.log_prob == "path":
        to_z = to_z - of_q * (eps / std).detach()
        of_q = None
    d_eps, to_std = torch.zeros_like(m), None
    d_logvar = None if of_q is None else -0.5 * of_q
    if has_z:  # else an infinite slope would make NaN of zeros
        d_eps = to_z * std
        if form.direct is None:
            d_logvar = formulas.plus(d_logvar, d_eps, eps, 0.5)
        else:
            to_std = to_z * eps
    d_scale = formulas.of_scale(spec, s, std, d_logvar, to_std)
    if of_q is not None:
        d_eps = d_eps - of_q * eps
    found = Gradients(to_z, d_scale, d_eps, d_prior_mean, d_prior_scale)
    return formulas.of_operands(spec, x, found, upstream.z, needs)
