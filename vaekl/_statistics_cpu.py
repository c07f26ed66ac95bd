"""Column statistics by the numba kernel: tensors to kernel arguments."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vaekl.kernels import cpu as kernels

from ._cpu import Launch
from ._options import LOGVAR_RANGE, Options
from ._plans import Arrangement, arrange_forward, arranged


class _Launch(Launch):
    """In float64, with sums of its own."""

    def __init__(
        self, arrangement: Arrangement, mu: Tensor, logvar: Tensor, options: Options
    ) -> None:
        dtypes = [mu.dtype, logvar.dtype]
        super().__init__(kernels.statistics, arrangement, dtypes, torch.float64, options)
        self.numbers, self.buffers = np.array(LOGVAR_RANGE), kernels.STATISTICS_BUFFERS
        batch, event, _, tile_cols, range_rows = (int(n) for n in self.plan[:5])
        tiles, ranges = -(-event // tile_cols), -(-batch // range_rows)
        self.shared = 3 + tiles + ranges * kernels.SUMS * event


def sums(mu: Tensor, logvar: Tensor, batch_dims: int) -> Tensor:
    """The rows of ``_statistics.ROWS``, float64 [9, D]."""
    options = Options(None, None, False, batch_dims, None)
    arrangement = arrange_forward(mu, logvar, None, options)
    if arrangement is None:
        mu, (logvar,) = arranged(mu, (logvar,), batch_dims)
        return sums(mu, logvar, batch_dims)
    shape = (kernels.SUMS + 1, arrangement.view.event)
    out = torch.empty(shape, dtype=torch.float64, device="cpu")
    launch = _Launch(arrangement, mu, logvar, options)
    launch((mu, logvar, out), mu.data_ptr(), logvar.data_ptr(), out.data_ptr())
    return out
