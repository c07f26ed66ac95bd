"""NumPy arrays of float64, of whatever came in, and sums of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]


def to_numpy(values: Any) -> Array:
    """A float64 array of a tensor (any dtype, device), array or number."""
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def total(values: Array, axis: int | None = None) -> Array:
    """A sum whose own rounding does not show in float64."""
    return np.asarray(np.sum(values, axis=axis, dtype=np.longdouble), dtype=np.float64)


def divide(total: Array, count: int) -> Array:
    """0 / 0 is NaN, as the mean of nothing is in torch."""
    with np.errstate(all="ignore"):
        return np.asarray(np.divide(total, np.float64(count)))


def unbroadcast(values: Array, shape: Sequence[int]) -> Array:
    """The sum over the axes along which a tensor of this shape was broadcast."""
    axes = tuple(range(values.ndim - len(shape))) + tuple(
        axis - len(shape) for axis, size in enumerate(shape) if size == 1
    )
    summed = np.sum(values, axis=axes, dtype=np.longdouble, keepdims=True)
    return np.asarray(summed, dtype=np.float64).reshape(shape)
