"""Column statistics by the Triton kernel: tensors to kernel arguments, one launch."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from vaekl.kernels.statistics import SUMS, scratch_size, statistics_kernel

from . import _layout
from ._launch import Launch, is_elsewhere
from ._options import LOGVAR_RANGE, Options
from ._plans import arrange_forward, arranged
from ._workspace import workspaces


def config() -> _layout.Config:
    """Half a block: sums in float64 fill the registers sooner."""
    usual = _layout.current_config()
    return replace(usual, tile=usual.tile // 2)


def sums(mu: Tensor, logvar: Tensor, batch_dims: int) -> Tensor:
    """The rows of ``_statistics.ROWS``, float64 [9, D] on mu's device."""
    if is_elsewhere(mu):
        with torch.cuda.device(mu.device):
            return sums(mu, logvar, batch_dims)
    arrangement = arrange_forward(mu, logvar, None, Options(None, None, False, batch_dims, None))
    if arrangement is None:
        mu, (logvar,) = arranged(mu, (logvar,), batch_dims)
        return sums(mu, logvar, batch_dims)
    view = arrangement.view
    grid = _layout.grid(view.batch, view.event, config())
    fixed = [
        *LOGVAR_RANGE,
        view.batch,
        view.event,
        view.inner,
        grid.rows_per_range,
        *chain(*arrangement.strides[:2]),
        grid.ranges > 1,
        view.split,
        view.wide,
    ]
    out = torch.empty(int(SUMS.value) + 1, view.event, dtype=torch.float64, device=mu.device)
    scratch = counters = None
    size = scratch_size(grid.ranges, view.event)
    if size:
        scratch, counters = workspaces.get(mu.device, torch.float64, size, grid.tiles)
    Launch(statistics_kernel, grid, fixed)((mu, logvar, out, scratch, counters), (0, 1))
    return out
