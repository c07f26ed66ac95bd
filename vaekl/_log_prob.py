"""Samples with their log densities, for bounds that are estimated by drawing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _validate, functional
from ._spec import Clamp, Operands, Prior, ReparamLogProb, Terms, Values


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
    bound (Burda, Grosse & Salakhutdinov 2016). One launch, and one backward.

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
    path = _validate.flag("path_derivative", path_derivative)
    terms = Terms(True, log_prob="path" if path else "total")
    source = functional.source_of(generator, seed, sample_ids)
    given: Any = Operands(mu, logvar, eps)  # type: ignore[arg-type]
    results: Any = functional.compute(
        given, source, terms, batch_dims, scale, clamp, backend, prior
    )
    return ReparamLogProb(*results)
