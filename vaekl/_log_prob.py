"""Samples with their log densities, for bounds that are estimated by drawing."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from . import _validate, functional
from ._spec import (
    Clamp,
    Operands,
    Prior,
    ReparamLogProb,
    Source,
    Terms,
    Values,
    compute_dtype,
    sample_dtype,
)
from .backends.forms import FORMS, Bounds, clamped_logvar

LN_2_PI = math.log(2 * math.pi)


def reparameterize_log_prob(
    mu: Tensor,
    logvar: Values,
    *,
    path_derivative: bool = False,
    batch_dims: int | None = None,
    eps: Values | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    scale: str = "logvar",
    prior: Prior = None,
    clamp: Clamp = None,
    backend: str = "auto",
) -> ReparamLogProb:
    """``z = mu + exp(logvar / 2) * eps``, and its log densities under the posterior and the prior.

    - ``log_q = -½ Σ_d (ln 2π + logvar + eps²)``, of the noise itself: in half precision z has
      lost it
    - ``log_p = -½ Σ_d (ln 2π + l' + (z − m')² e^−l')``, of z before it is rounded to its dtype

    ``log_q − log_p`` is the KL as one draw estimates it. For K draws of each sample give
    ``mu.expand(K, B, D)`` and ``batch_dims=2``, which is read in place: docs/recipes.md has IWAE's
    bound (Burda, Grosse & Salakhutdinov 2016). Beside z's launch these are plain torch operations.

    Args:
        mu, logvar, batch_dims, eps, generator, seed, sample_ids, scale, prior, clamp, backend: As
            in :func:`vaekl.reparameterize_kl`; z is what that gives for the same noise.
        path_derivative: Whether the gradient of log_q holds the parameters of q and goes through z
            alone, as Roeder, Wu & Duvenaud (2017) propose: its variance is 0 where q is the true
            posterior. The values are the same.

    Returns:
        :class:`ReparamLogProb` (z, log_q, log_p); both of shape ``mu.shape[:batch_dims]``, float32,
        or float64 if any input is, in nats.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: A shape, device, option or combination that does not fit.
        ModuleNotFoundError: A backend asked for by name is not installed, or cannot run.
    """
    path_derivative = _validate.flag("path_derivative", path_derivative)
    form = _validate.choice("scale", scale, _validate.SCALES)
    given, noise, of_scalars = _validate.broadcast(mu, logvar, eps)
    batch_dims = _validate.batch_dims(batch_dims, mu)
    pair = None
    if prior is not None:
        _, *pair = _validate.prior(prior, mu, (given, noise), batch_dims, None)
    bounds = _validate.clamp_bounds(clamp, Operands(mu, given, noise, *(pair or ())))

    z_dtype = of_scalars or sample_dtype(mu, given, noise)
    dtype = compute_dtype(mu, given, noise, *(pair or ()))
    m, s = mu.to(dtype), given.to(dtype)
    source = functional.checked(
        mu, noise, functional.source_of(generator, seed, sample_ids), batch_dims
    )
    if noise is None:  # that of N(0, 1)
        zero = m.new_zeros(()).expand(m.shape)
        noise = _sample(Operands(zero, zero), source, batch_dims, "logvar", None, backend)
    noise = noise.to(dtype)
    z = _sample(Operands(m, s, noise), Source(), batch_dims, form, bounds, backend)
    axes = tuple(range(batch_dims, mu.dim()))
    log_q = _log_q(z, s, noise, form, bounds, path_derivative)
    if pair is None:
        log_p = z.square() + LN_2_PI
    else:
        of_mean, of_scale = (t.to(dtype) for t in pair)
        distance = (z - of_mean) * FORMS[form].root(of_scale)
        log_p = distance.square() + (FORMS[form].logvar(of_scale) + LN_2_PI)
    both = (-0.5 * (t.sum(axes) if axes else t) for t in (log_q, log_p))
    return ReparamLogProb(z.to(z_dtype), *both)


def _sample(
    x: Operands, source: Source, batch_dims: int, form: str, bounds: Bounds, backend: str
) -> Tensor:
    terms = Terms(sample=True)
    return cast(Tensor, functional.compute(x, source, terms, batch_dims, form, bounds, backend)[0])


def _log_q(
    z: Tensor, scale: Tensor, eps: Tensor, form: str, bounds: Bounds, path_derivative: bool
) -> Tensor:
    """-2 log q of each element; with path_derivative its gradient goes through z alone."""
    logvar = clamped_logvar(form, scale, bounds)
    if not path_derivative:
        return logvar + LN_2_PI + eps.square()
    # d log q / dz = -eps / std, with eps and std held; the path's own value is 0.
    logvar, held = logvar.detach(), eps.detach()
    slope = held * (torch.exp(-0.5 * logvar) if bounds else FORMS[form].root(scale.detach()))
    return logvar + LN_2_PI + held.square() + 2.0 * slope * (z - z.detach())
