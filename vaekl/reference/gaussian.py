"""One element's KL from a Gaussian to another, whatever the scale of both is given as.

With d = m - m', r = l - l' (l = logvar; ' is the prior's):

    k = (d^2 e^-l' + phi(r)) / 2        phi(r) = e^r - 1 - r

(Kingma & Welling 2013, appendix B, for two Gaussians.) As r -> 0 all of phi's terms cancel; so r,
or u = (s - s') / s' of standard deviations or variances, is taken before anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .arrays import Array, to_numpy

_WIDE = np.longdouble


def phi(logvar: Array) -> Array:
    """exp(l) - 1 - l: its Taylor series for |l| <= 1, where the difference would cancel."""
    logvar = np.asarray(logvar, dtype=np.float64)
    with np.errstate(all="ignore"):
        series = np.zeros_like(logvar)
        for k in range(30, 1, -1):  # l^2/2! (1 + l/3 (1 + l/4 (...)))
            series = (1.0 + series) * logvar / k
        return np.where(np.abs(logvar) <= 1.0, series * logvar, np.expm1(logvar) - logvar)


def psi(u: Array, ratio: Array) -> Array:
    """u - log(ratio), long double, for ratio = 1 + u: of s = u / (2 + u) a series for |u| <= 1/2,
    where the difference would cancel.
    """
    with np.errstate(all="ignore"):
        s = np.where(np.abs(u) <= 0.5, u / (2.0 + u), 0.0)
        series = np.zeros_like(s)
        for k in range(24, -1, -1):
            series = series * s * s + _WIDE(1.0) / (2 * k + 3)
        near = 2.0 * s * s / (1.0 - s) - 2.0 * s**3 * series
        return np.where(np.abs(u) <= 0.5, near, u - np.log(ratio))


class Scale(NamedTuple):
    """A form in which the scale of a Gaussian is given. All functions are elementwise."""

    logvar: Callable[[Array], Array]
    std: Callable[[Array], Array]
    slope: Callable[[Array], Array]  # of logvar
    std_slope: Callable[[Array], Array]
    #: Of the posterior's and the prior's: (e^r - 1, phi(r)).
    terms: Callable[[Array, Array], tuple[Array, Array]]
    one: float  # the scale of N(0, 1)


def _terms_of_log(r: Array) -> tuple[Array, Array]:
    r = np.asarray(r, dtype=np.float64)
    return np.expm1(r), phi(r)


def _ratio(scale: Array, prior: Array) -> tuple[Array, Array]:
    """(u, 1 + u); NaN where there is no logarithm of one of them."""
    scale, prior = np.asarray(scale, dtype=_WIDE), np.asarray(prior, dtype=_WIDE)
    prior = np.where((scale < 0) | (prior < 0), np.nan, prior)
    ratio = scale / prior
    return np.where(np.isinf(prior), ratio - 1.0, (scale - prior) / prior), ratio


def _terms_of_std(scale: Array, prior: Array) -> tuple[Array, Array]:
    u, ratio = _ratio(scale, prior)
    return u * (2.0 + u), u * u + 2.0 * psi(u, ratio)


def _terms_of_var(scale: Array, prior: Array) -> tuple[Array, Array]:
    u, ratio = _ratio(scale, prior)
    return u, psi(u, ratio)


SCALES = {
    "logvar": Scale(
        lambda s: s,
        lambda s: np.exp(0.5 * s),
        np.ones_like,
        lambda s: 0.5 * np.exp(0.5 * s),
        lambda s, p: _terms_of_log(s - p),
        0.0,
    ),
    "log_std": Scale(
        lambda s: 2.0 * s,
        np.exp,
        lambda s: np.full_like(s, 2.0),
        np.exp,
        lambda s, p: _terms_of_log(2.0 * (s - p)),
        0.0,
    ),
    "std": Scale(
        lambda s: 2.0 * np.log(s),
        lambda s: s,
        lambda s: 2.0 / s,
        np.ones_like,
        _terms_of_std,
        1.0,
    ),
    "var": Scale(
        np.log,
        np.sqrt,
        lambda s: 1.0 / s,
        lambda s: 0.5 / np.sqrt(s),
        _terms_of_var,
        1.0,
    ),
}


class Pair(NamedTuple):
    """Of each element, a posterior and a prior: what their KL and its derivatives consist of."""

    distance: Array  # d
    weight: Array  # e^-l'
    expm1: Array  # e^r - 1
    phi: Array  # phi(r)

    @property
    def kl(self) -> Array:
        """k, in nats."""
        return np.asarray(0.5 * (self.distance**2 * self.weight + self.phi), np.float64)

    @property
    def slopes(self) -> tuple[Array, Array, Array, Array]:
        """dk/dm, dk/dl, dk/dm', dk/dl'."""
        of_mean = self.distance * self.weight
        of_prior = -0.5 * (self.distance * of_mean + self.expm1)
        return of_mean, 0.5 * self.expm1, -of_mean, of_prior


def kl_between(mean: Any, logvar: Any, other_mean: Any, other_logvar: Any) -> Array:
    """Elementwise KL in nats from N(mean, e^logvar) to N(other_mean, e^other_logvar)."""
    m, v, n, w = (to_numpy(t) for t in (mean, logvar, other_mean, other_logvar))
    with np.errstate(all="ignore"):
        return np.asarray(0.5 * ((m - n) ** 2 * np.exp(-w) + phi(v - w)))


def nll(sample: Any, mean: Any, logvar: Any) -> Array:
    """Elementwise -log N(sample; mean, e^logvar) in nats."""
    x, m, v = (to_numpy(t) for t in (sample, mean, logvar))
    with np.errstate(all="ignore"):
        return np.asarray(0.5 * (np.log(2.0 * np.pi) + v + (x - m) ** 2 * np.exp(-v)))
