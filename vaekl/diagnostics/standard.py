"""Posteriors in standard deviations of their prior: what is said of N(0, I) holds of those.

A KL between Gaussians is the same where both are moved and scaled, and so are information and the
aggregate's KL. Moments are put back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vaekl import _validate
from vaekl._spec import LOGVAR_RANGE, sizes
from vaekl._spec import Prior as Given
from vaekl.backends.forms import FORMS

from .statistics import Gaussian, Statistics, collect

Pair = tuple[Tensor, Tensor]  # mean and scale


def prior_of(given: Given, scale: str, mu: Tensor, logvar: Tensor, batch_dims: int) -> Pair | None:
    """One prior for all samples, of the event's shape; None of N(0, I) in logvars.

    Raises:
        TypeError, ValueError: As ``reparameterize_kl``, for prior; it has a batch axis.
    """
    if given is None or _validate.is_standard(given, scale):
        if scale == "logvar":
            return None
        given = 0.0, 0.0 if FORMS[scale].direct is None else 1.0
    # In float64, as all here: numbers would have the digits of the call.
    wide = torch.empty(1, dtype=torch.float64, device="meta")
    kind, mean, of_prior = _validate.prior(given, mu, (logvar, wide), batch_dims, None)
    if kind != "event":
        shapes = " and ".join(str(tuple(getattr(value, "shape", ()))) for value in given)
        raise ValueError(
            "diagnostics take a prior without batch axes, one for all samples; got a mean and "
            f"scale of shapes {shapes} for mu of shape {tuple(mu.shape)} with "
            f"batch_dims={batch_dims}"
        )
    return mean.detach().resolve_neg(), of_prior.detach().resolve_neg()


def collect_to(
    prior: Pair, scale: str, mu: Tensor, given: Tensor, batch_dims: int, backend: str
) -> Statistics:
    """The statistics of posteriors in standard deviations of the prior."""
    form = FORMS[scale]
    mean, of_prior, given = (t.double() for t in (*prior, given))
    distance = given - of_prior  # before anything else: near the prior it loses nothing
    if form.direct is None:
        r = form.logvar(distance)
    else:  # of a quotient, which has no logarithm where the prior has none
        r = torch.log1p(distance / torch.where(of_prior < 0.0, torch.nan, of_prior))
        r = 2.0 * r if scale == "std" else r
    gaussian = Gaussian(mean.flatten().cpu(), form.logvar(of_prior).flatten().cpu())
    if not all(bool(t.isfinite().all()) for t in gaussian):
        raise ValueError("prior must be finite, of a scale that has a finite logarithm")
    is_standard = not any(bool(t.any()) for t in gaussian)
    far = (mu.double() - mean) * form.root(of_prior)
    found = collect(far, r, batch_dims, backend)
    of_mu, of_logvar, outside = _counts(mu, form.logvar(given), batch_dims)
    return found._replace(
        nonfinite_mu=of_mu,
        nonfinite_logvar=of_logvar,
        logvar_outside=outside,
        prior=None if is_standard else gaussian,
    )


def _counts(mu: Tensor, logvar: Tensor, batch_dims: int) -> list[Tensor]:
    """As of ``statistics.ROWS``: of values as they were given."""
    low, high = LOGVAR_RANGE
    is_outside = logvar.isfinite() & ((logvar < low) | (logvar > high))
    shape = sizes(mu.shape, batch_dims)
    found: Any = (~mu.isfinite(), ~logvar.isfinite(), is_outside)
    return [flags.reshape(shape).sum(0).cpu() for flags in found]
