"""Forms of a scale in torch operations, the twin of ``kernels/forms.py`` (see there).

All are differentiable any number of times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vaekl.kernels.coefficients import LN_F64

Bounds = tuple[float, float] | None  # on logvar
_OPEN = (-math.inf, math.inf)


def is_inside(logvar: Tensor, bounds: Bounds) -> Tensor:
    """Where clamp has a gradient: between its bounds, of which an infinite one is none."""
    lo, hi = bounds or _OPEN
    if lo == -math.inf:
        return logvar < hi
    return logvar > lo if hi == math.inf else (logvar > lo) & (logvar < hi)


def bounded(logvar: Tensor, bounds: Bounds) -> Tensor:
    """torch.clamp."""
    return logvar if bounds is None else logvar.clamp(*bounds)


def clamped(logvar: Tensor, bounds: Bounds) -> Tensor:
    """torch.clamp, with that gradient: torch's own has one at the bounds before 2.14."""
    if bounds is None:
        return logvar
    return torch.where(is_inside(logvar, bounds), logvar, _outside(logvar, bounds))


def _outside(logvar: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The bound that logvar is at, or NaN: a constant to every derivative."""
    lo, hi, nan = (logvar.new_full((), value) for value in (*bounds, math.nan))
    return torch.where(logvar <= lo, lo, torch.where(logvar >= hi, hi, nan))


def _psi(u: Tensor, x: Tensor, is_quotient: bool = False) -> Tensor:
    """u - log(x) of x = 1 + u, without cancellation near u = 0.

    The series goes on, in float32, until what is left is large beside the rounding of a quotient.
    """
    if is_quotient and u.dtype == torch.float32:
        is_near = (x > 1 / 3) & (x < 3.0)
    else:
        is_near = u.abs() < 0.375
    s = torch.where(is_near, u, 0.0)
    s = s / (s + 2.0)
    square = s * s
    series = torch.zeros_like(s)
    for coefficient in LN_F64[:-1]:
        series = series * square + coefficient
    near = square * (2.0 / (1.0 - s) - s * series)
    u, x = torch.where(is_near, 0.0, u), torch.where(is_near, 1.0, x)
    return torch.where(is_near, near, u - torch.log(x))


def _ratio(s: Tensor, prior: Tensor | None) -> tuple[Tensor, Tensor]:
    """u = (s - prior) / prior, and 1 + u = s / prior."""
    if prior is None:
        return s - 1.0, s
    ratio = s / prior
    return torch.where(prior == math.inf, ratio - 1.0, (s - prior) / prior), ratio


def _phi_of_std(s: Tensor, prior: Tensor | None) -> Tensor:
    u, ratio = _ratio(s, prior)
    return u * u + 2.0 * _psi(u, ratio, prior is not None)


def _expm1_of_std(s: Tensor, prior: Tensor | None) -> Tensor:
    u, _ = _ratio(s, prior)
    return u * (u + 2.0)


#: Of a posterior's scale and a prior's, None for N(0, 1).
OfBoth = Callable[[Tensor, Tensor | None], Tensor]


class Direct(NamedTuple):
    """Of a scale that is no logarithm: each from the scale itself. With r = logvar, less that of a
    prior:
    """

    std: Callable[[Tensor], Tensor]
    expm1: OfBoth  # e^r - 1
    phi: OfBoth  # e^r - 1 - r
    std_slope: Callable[[Tensor, Tensor], Tensor]  # (values, std): the values times dstd / dscale


class Form(NamedTuple):
    """Elementwise."""

    logvar: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]  # (values, scale): the values times dlogvar / dscale
    root: Callable[[Tensor], Tensor]  # exp(-logvar / 2)
    direct: Direct | None = None  # None: std, e^logvar - 1 and phi are those of logvar


FORMS = {
    "logvar": Form(lambda s: s, lambda values, s: values, lambda s: torch.exp(-0.5 * s)),
    "log_std": Form(lambda s: 2.0 * s, lambda values, s: 2.0 * values, lambda s: torch.exp(-s)),
    "std": Form(
        lambda s: 2.0 * torch.log(s),
        lambda values, s: 2.0 * values / s,
        torch.reciprocal,
        Direct(
            std=lambda s: s,
            expm1=_expm1_of_std,
            phi=_phi_of_std,
            std_slope=lambda values, std: values,
        ),
    ),
    "var": Form(
        torch.log,
        lambda values, s: values / s,
        lambda s: torch.reciprocal(torch.sqrt(s)),
        Direct(
            std=torch.sqrt,
            expm1=lambda s, prior: _ratio(s, prior)[0],
            phi=lambda s, prior: _psi(*_ratio(s, prior), prior is not None),
            std_slope=lambda values, std: 0.5 * values / std,
        ),
    ),
}


def inner(name: str, scale: Tensor, bounds: Bounds) -> Tensor:
    """The scale, but 1 where its logvar is at a bound: there a logarithm or a root would make NaN
    of a gradient of 0.
    """
    form = FORMS[name]
    if bounds is None or form.direct is None:
        return scale
    return torch.where(is_inside(form.logvar(scale), bounds), scale, 1.0)


def clamped_logvar(name: str, scale: Tensor, bounds: Bounds) -> Tensor:
    """``clamped``, of a scale in any form; no NaN is in the gradient of what is not inside."""
    form = FORMS[name]
    logvar = form.logvar(scale)
    if bounds is None or form.direct is None:
        return clamped(logvar, bounds)
    there = form.logvar(inner(name, scale, bounds))
    return torch.where(is_inside(logvar, bounds), there, _outside(logvar, bounds))


def bounded_logvar(name: str, scale: Tensor, bounds: Bounds) -> Tensor:
    """``bounded``, of a scale in any form."""
    return bounded(FORMS[name].logvar(scale), bounds)
