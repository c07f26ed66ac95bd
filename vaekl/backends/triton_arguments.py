"""Arguments of the Triton kernels that a plan fixes, in the order in which kernels have them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from vaekl._spec import Spec, kl_denominator, sizes

from . import layout
from .strided import Arrangement

_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def unit(view: layout.View, dtypes: Iterable[torch.dtype], is_drawn: bool) -> int:
    """UNIT: what a thread has of a row at a time. 16 bytes, but of noise one group."""
    widest = max(dtype.itemsize for dtype in dtypes)
    return view.unit(4 if is_drawn else max(16 // widest, 4))


def dtypes(*tensors: Tensor | None) -> list[torch.dtype]:
    """Of those that there are."""
    return [t.dtype for t in tensors if t is not None]


def of_view(view: layout.View, unit: int, spec: Spec) -> list[Any]:
    """lo, hi, B, D, inner."""
    return [*(spec.clamp or (0.0, 0.0)), view.batch, view.event // unit, view.inner // unit]


def of_sizes(view: layout.View, unit: int, grid: layout.Grid, spec: Spec, mu: Tensor) -> list[Any]:
    """lo, hi, B, D, inner, beside, rows_per_range, kl_denominator."""
    return [
        *of_view(view, unit, spec),
        view.beside,
        grid.rows_per_range,
        kl_denominator(spec.reduction, *sizes(mu.shape, spec.batch_dims)),
    ]


def of_strides(arrangement: Arrangement, unit: int, without: int = 0) -> list[Any]:
    """Row, outer and inner of each tensor; None of so many last ones: not even a parameter of the
    kernel is left of those.
    """
    count = len(arrangement.strides) - without
    found: list[Any] = []
    for row, outer, inner in arrangement.strides[:count]:
        found += row // unit, outer // unit, inner
    return found + [None] * (3 * without)


def of_flags(view: layout.View, unit: int, dtype: torch.dtype) -> list[Any]:
    """SPLIT_EVENT, UNIT, CHANNELS, WIDE, DTYPE."""
    return [view.split, unit, view.channels, view.wide, _DTYPES[dtype]]
