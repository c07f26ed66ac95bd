"""logvar and eps as tensors of mu's shape: numbers and smaller tensors, as plain code takes them.

Nothing is copied: an expanded tensor has strides of 0, and autograd sums its gradient.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from . import _validate
from ._options import sample_dtype


def is_like(mu: Tensor, logvar: Tensor, eps: Tensor | None) -> bool:
    """Have these tensors one shape?"""
    shape = mu.shape
    same: bool = logvar.shape == shape and (eps is None or eps.shape == shape)
    return same


def to_mu(mu: Any, logvar: Any, eps: Any) -> tuple[Tensor, Tensor | None, torch.dtype | None]:
    """(logvar, eps, dtype): of mu's shape; the dtype that z is to be cast to, None if it is right.

    Raises:
        TypeError, ValueError: As ``reparameterize_kl``, for its tensors.
    """
    _validate.tensor("mu", mu)
    spread = [_expanded(name, value, mu) for name, value in (("logvar", logvar), ("eps", eps))]
    scalars = [value for value in (logvar, eps) if value is not None and _is_scalar(value)]
    return spread[0], spread[1], sample_dtype(mu, logvar, eps) if scalars else None


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.dim() == 0


def _expanded(name: str, value: Any, mu: Tensor) -> Any:
    if value is None and name == "eps":
        return None
    wide = torch.promote_types(mu.dtype, torch.float32)  # a half scalar would lose digits
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return mu.new_full((), float(value), dtype=wide).expand(mu.shape)
    _validate.tensor(name, value)
    if value.dim() == 0 and mu.dim():
        device = mu.device if value.device.type == "cpu" else value.device
        value = value.to(device, wide)
    return value.expand(mu.shape) if _validate.broadcasts(name, value, mu) else value
