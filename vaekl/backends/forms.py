"""Forms of a scale in torch operations, the twin of ``kernels/forms.py`` (see there)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Bounds = tuple[float, float] | None  # on logvar, of a form that has any
_OPEN = (-math.inf, math.inf)


def same(scale: Tensor, bounds: Bounds) -> Tensor:
    """The scale is logvar."""
    return scale


def _gradient_of_same(d_logvar: Tensor, scale: Tensor, bounds: Bounds) -> Tensor:
    return d_logvar


def _is_inside(scale: Tensor, bounds: Bounds) -> Tensor:
    """Where clamp has a gradient: between its bounds, of which an infinite one is none."""
    lo, hi = bounds or _OPEN
    if lo == -math.inf:
        return scale < hi
    return scale > lo if hi == math.inf else (scale > lo) & (scale < hi)


def _clamp(scale: Tensor, bounds: Bounds) -> Tensor:
    return scale.clamp(*(bounds or _OPEN))


def clamped(scale: Tensor, bounds: Bounds) -> Tensor:
    """torch.clamp, with that gradient: torch's own has one at the bounds before 2.14."""
    lo, hi, nan = (scale.new_full((), value) for value in (*(bounds or _OPEN), math.nan))
    outside = torch.where(scale <= lo, lo, torch.where(scale >= hi, hi, nan))
    return torch.where(_is_inside(scale, bounds), scale, outside)


def _gradient_of_clamped(d_logvar: Tensor, scale: Tensor, bounds: Bounds) -> Tensor:
    return torch.where(_is_inside(scale, bounds), d_logvar, 0.0)


class Form(NamedTuple):
    """Each takes bounds last."""

    values: Callable[[Tensor, Bounds], Tensor]  # logvar, in the fewest passes over memory
    logvar: Callable[[Tensor, Bounds], Tensor]  # the same, differentiable any number of times
    gradient: Callable[[Tensor, Tensor, Bounds], Tensor]  # linear in the first, as a derivative is


FORMS = {
    "logvar": Form(same, same, _gradient_of_same),
    "clamped": Form(_clamp, clamped, _gradient_of_clamped),
}
