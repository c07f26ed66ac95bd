"""A prior in torch operations, the twin of ``kernels/prior.py`` (see there).

All are differentiable any number of times.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vaekl._spec import Operands, Spec, compute_dtype

from .forms import FORMS

#: e^r past this is not corrected: it may be infinite.
_LARGE = 1e30


class Ratio(NamedTuple):
    """r, a logvar less another, and what rounding has taken from it: of logvars some 10 apart as
    much as a KL's budget.
    """

    r: Tensor
    low: Tensor | None = None

    def expm1(self) -> Tensor:
        """e^r - 1."""
        expm1 = torch.expm1(self.r)
        if self.low is None:
            return expm1
        return torch.addcmul(expm1, self.low, (expm1 + 1.0).clamp(max=_LARGE))

    def corrected(self, phi: Tensor) -> Tensor:
        """Of phi(r) as it is rounded."""
        if self.low is None:
            return phi
        return torch.addcmul(phi, self.low, torch.expm1(self.r).clamp(max=_LARGE))


class Prior(NamedTuple):
    """In the compute dtype; it broadcasts against mu."""

    mean: Tensor
    scale: Tensor
    logvar: Tensor
    root: Tensor  # exp(-logvar / 2)

    def far(self, m: Tensor) -> Tensor:
        """(m - mean) exp(-logvar / 2), of which the square does not overflow before it has to."""
        return (m - self.mean) * self.root

    def ratio(self, v: Tensor) -> Ratio:
        """v - logvar; its rounding by Knuth's two-sum."""
        r = v - self.logvar
        if r.dtype == torch.float64:
            return Ratio(r)
        near = r + self.logvar
        low = (v - near) - (self.logvar - (near - r))
        return Ratio(r, torch.where(low == low, low, 0.0))  # NaN: of infinities

    def of_event(self, mean_over: str | None) -> Prior:
        """As means of mu and logvar have it: [D], or for "all" one number."""
        flat = [t.reshape(-1) for t in self]
        return Prior(*(t[:1].sum() if mean_over == "all" else t for t in flat))


def prior_of(spec: Spec, x: Operands) -> Prior | None:
    """None for N(0, I)."""
    if x.prior_mean is None or x.prior_scale is None:
        return None
    form, dtype = FORMS[spec.form], compute_dtype(*x)
    mean, scale = x.prior_mean.to(dtype), x.prior_scale.to(dtype)
    if form.direct is not None:  # a quotient of two that are negative has a logarithm
        scale = torch.where(scale < 0.0, math.nan, scale)
    return Prior(mean, scale, form.logvar(scale), form.root(scale))
