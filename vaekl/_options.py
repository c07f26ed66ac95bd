"""What a call asks for, in the form that operators and backends share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Where exp(logvar) is of use in float32; implementations of VAEs clamp logvar to it.
LOGVAR_RANGE = (-30.0, 20.0)


class Options(NamedTuple):
    """Static options of one call. None for what is not wanted."""

    reduction: str | None  # of kl: "none", "sum", "batchmean", "mean"
    mean_over: str | None  # of kl_of_mean: "batch", "all"
    sample: bool  # z wanted
    batch_dims: int
    clamp: tuple[float, float] | None


def sizes(shape: torch.Size, batch_dims: int) -> tuple[int, int]:
    """(B, D): number of samples and elements per event."""
    return math.prod(shape[:batch_dims]), math.prod(shape[batch_dims:])


def kl_denominator(reduction: str | None, batch: int, event: int) -> int:
    """What the sum over all samples is divided by."""
    return {"batchmean": batch, "mean": batch * event}.get(reduction or "", 1)


def sample_dtype(mu: torch.Tensor, *others: Any) -> torch.dtype:
    """The dtype of mu + exp(logvar / 2) * eps, of whichever of these are tensors.

    As torch.result_type, which torch.compile does not know: scalars count only beside others.
    """
    dtype = mu.dtype
    for value in others:
        if isinstance(value, torch.Tensor) and value.dtype is not dtype:
            if value.dim() or not mu.dim():
                dtype = torch.promote_types(dtype, value.dtype)
    return dtype


def compute_dtype(mu: torch.Tensor, logvar: torch.Tensor, eps: torch.Tensor | None) -> torch.dtype:
    """float64 if any input is, else float32; also the dtype of kl and kl_of_mean."""
    wide = torch.float64
    if mu.dtype is wide or logvar.dtype is wide or (eps is not None and eps.dtype is wide):
        return wide
    return torch.float32
