"""Column statistics by the numba kernel: tensors to kernel arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from vaekl.kernels import cpu as kernels

from ._cpu import Launch
from ._options import LOGVAR_RANGE, Options
from ._plans import arrange_forward, arranged


def sums(mu: Tensor, logvar: Tensor, batch_dims: int) -> Tensor:
    """The rows of ``_statistics.ROWS``, float64 [9, D]."""
    options = Options(None, None, False, batch_dims, None)
    arrangement = arrange_forward(mu, logvar, None, options)
    if arrangement is None:
        mu, (logvar,) = arranged(mu, (logvar,), batch_dims)
        return sums(mu, logvar, batch_dims)
    shape = (kernels.COLUMN_SUMS + 1, arrangement.view.event)
    out = torch.empty(shape, dtype=torch.float64, device="cpu")
    dtypes, bounds = [mu.dtype, logvar.dtype], LOGVAR_RANGE
    launch = Launch(kernels.STATISTICS, arrangement, dtypes, options, torch.float64, bounds)
    launch(mu.data_ptr(), logvar.data_ptr(), out.data_ptr())
    return out
