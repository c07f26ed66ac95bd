"""A provider is timed only after its results were found right.

The noise is the provider's own. It is recovered from z, has to look like independent standard
normals, and with it the oracle says what everything else has to be.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from providers import Step

from vaekl.reference import Array, Oracle, to_numpy
from vaekl.testing import unit, worst

#: Roundings of a result's terms, in the dtype of z, that a right provider may add up to.
ROUNDINGS = 8
#: Standard errors that a statistic of the noise may be off by.
SIGMAS = 6


def fault(step: Step) -> str | None:
    """What is wrong with the step's results, None if nothing is.

    The upstream gradients of the KLs should be about the batch size, so that their share of the
    gradients is not lost beside that of z.
    """
    (z, *kls), gradients = step.forward_backward()
    if z.shape != step.mu.shape or any(kl.shape != () for kl in kls):
        return f"shapes are {[tuple(t.shape) for t in (z, *kls)]}"
    if not all(bool(t.isfinite().all()) for t in (z, *kls, *gradients)):
        return "results are not finite"
    if bool((step.forward()[0] == z).all()):
        return "two calls give the same z"
    mu, logvar, sample = (to_numpy(t) for t in (step.mu, step.logvar, z))
    eps = (sample - mu) / np.exp(0.5 * logvar)
    for statistic, value, expected, error in statistics(eps):
        if abs(value - expected) > SIGMAS * error + ROUNDINGS * unit(z.dtype):
            return f"{statistic} of the noise is {value:.4g}, not {expected:.4g}"

    oracle = Oracle(mu, logvar, eps)
    exact = oracle.gradients(*step.upstream)
    sizes = magnitudes(oracle, sample, [np.abs(to_numpy(t)) for t in step.upstream], z.dtype)
    results = dict(zip(("kl", "kl_of_mean"), kls))
    results |= zip(("dmu", "dlogvar"), step.gradients(gradients))
    for name, result in results.items():
        expected = exact[name] if name in exact else getattr(oracle, name)
        ratio = worst(result, expected, ROUNDINGS * unit(z.dtype) * sizes[name])
        if not ratio <= 1:
            return f"{name} is off by {ratio:.3g} times the tolerance"
    return None


def statistics(eps: Array) -> Iterator[tuple[str, float, float, float]]:
    """(name, value, expected value, standard error) of what noise [B, ...] has to be like."""
    eps = eps.reshape(len(eps), -1)
    for axis, pairs in {
        "neighbours in a sample": (eps[:, 1:] * eps[:, :-1]),
        "neighbouring samples": (eps[1:] * eps[:-1]),
    }.items():
        if pairs.size:
            yield f"correlation between {axis}", float(pairs.mean()), 0.0, pairs.size**-0.5
    yield "mean", float(eps.mean()), 0.0, eps.size**-0.5
    yield "variance", float(np.mean(eps**2)), 1.0, (2 / eps.size) ** 0.5
    yield "mean size", float(np.abs(eps).mean()), (2 / np.pi) ** 0.5, (0.364 / eps.size) ** 0.5


def magnitudes(
    oracle: Oracle, z: Array, upstream: list[Array], dtype: torch.dtype
) -> dict[str, Array]:
    """Sums of |terms| of each result, which its rounding errors are in proportion to."""
    mu, logvar = np.abs(oracle.mu), oracle.logvar
    batch, event = len(mu), mu[0].size
    exp = np.exp(logvar)
    # A mean summed row after row in float32, as Inductor does on CPUs, is off by its square root.
    summing = 1 + batch**0.5 * unit(torch.float32) / unit(dtype)
    size_mu, size_logvar = mu.mean(0), np.abs(logvar).mean(0)
    exp_mean = np.exp(oracle.means[1]).reshape(size_mu.shape)
    dz, dkl, dkl_of_mean = [*upstream, np.float64(0)][:3]
    of_mean = dkl_of_mean * summing
    return {
        "kl": np.asarray(np.mean(1 + np.abs(logvar) + mu**2 + exp) * event / 2),
        "kl_of_mean": np.asarray(np.sum(1 + size_logvar + size_mu**2 + exp_mean) / 2) * summing,
        "dmu": dz + (dkl * mu + of_mean * size_mu) / batch,
        "dlogvar": 0.5 * dz * (np.abs(z) + mu)
        + (dkl * (1 + exp) + of_mean * (1 + exp_mean) * (1 + size_logvar)) / (2 * batch),
    }
