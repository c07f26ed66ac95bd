"""Launches of the cpu backend's kernels: into which pieces a call is cut, and on which threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaekl._spec import Spec, kl_denominator
from vaekl.kernels import cpu as kernels

from . import threads
from .strided import Arrangement

_KINDS = {
    torch.float32: kernels.F32,
    torch.float64: kernels.F64,
    torch.bfloat16: kernels.BF16,
    torch.float16: kernels.F16,
}
_NUMPY: dict[torch.dtype, Any] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
_NO_BOUNDS = (-math.inf, math.inf)
_MEAN_OVER = {None: kernels.NONE, "batch": kernels.BATCH, "all": kernels.ALL}
#: Elements that a worker takes at a time: few enough to share out, many enough to be worth it.
#: bench/cpu.py ("threads") shows two threads to be worth it from two shares on.
SHARE = 16384
#: Row ranges times column tiles, at most: each has sums of its own.
MOST_PIECES = 512
#: Rows of a range where each column has sums of its own, which are few bytes beside so many rows;
#: fewer if there would not be as many ranges.
ROWS_OF_SUMS, RANGES_OF_SUMS = 32, 16


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    """0 of one that is absent."""
    return tuple([0 if t is None else t.data_ptr() for t in tensors])


def dtype_of(tensor: Tensor | None) -> torch.dtype:
    """Any of one that is absent."""
    return torch.float32 if tensor is None else tensor.dtype


def planned(arrangement: Arrangement | None) -> Arrangement:
    """That there is one was seen when the plan was made."""
    if arrangement is None:
        raise RuntimeError("tensors of another layout than those that were planned for")
    return arrangement


class Launch:
    """A kernel with all but its addresses fixed; `dtypes`: of the tensors arranged, in order;
    `prior_sums`: are column sums wanted as gradients of a prior?
    """

    def __init__(
        self,
        kernel: kernels.Kernel,
        spec: Spec,
        arrangement: Arrangement,
        dtypes: Sequence[torch.dtype],
        dtype: torch.dtype,
        bounds: tuple[float, float] | None,
        prior_sums: bool = False,
    ) -> None:
        view, block = arrangement.view, kernels.BLOCK
        batch, event = view.batch, view.event
        least = 1
        if spec.mean_over == "batch" or spec.reduction == "per_dim" or prior_sums:
            least = min(ROWS_OF_SUMS, -(-batch // RANGES_OF_SUMS))
        tiles = -(-event // block)
        tile_cols = -(-event // (4 * tiles)) * 4
        tiles = -(-event // tile_cols)
        # Whole blocks of rows, where a block is more than one.
        step = max(block // tile_cols, 1) if tiles == 1 else 1
        range_rows = max(SHARE // tile_cols, -(-batch * tiles // MOST_PIECES), least)
        range_rows = -(-range_rows // step) * step
        ranges = -(-batch // range_rows)
        chunk = max(SHARE // (tile_cols * min(range_rows, batch)), 1)
        plan = kernels.Plan(
            batch,
            event,
            view.inner,
            tile_cols,
            range_rows,
            tiles,
            ranges,
            chunk,
            spec.reduction == "none",
            spec.reduction == "per_dim",
            _MEAN_OVER[spec.mean_over],
            kl_denominator(spec.reduction, batch, event),
            arrangement.dkl_row,
            arrangement.dsecond_row,
            spec.log_prob == "path",
            view.period,
            kernels.FORMS[spec.form],
            spec.samples == "keys",
            prior_sums,
            *(bounds or _NO_BOUNDS),
        )
        layouts = [(_KINDS[d], *strides) for d, strides in zip(dtypes, arrangement.strides)]
        self._set(kernels.pack(plan, layouts))
        self.run, self.dtype, self.reduction = kernel.run, _NUMPY[dtype], spec.reduction
        self.memory, self.scratch = kernel.buffers * block, kernel.scratch_size(plan)
        self.is_shared_out = tiles * ranges > chunk
        strides_of_rows = {(event, 0, 1), (0, 0, 0)}
        self.is_resizable = (
            spec.batch_dims == 1
            and spec.prior is None
            and spec.log_prob is None
            and spec.reduction != "per_dim"
            and _is_small(batch, event)
            and strides_of_rows.issuperset(arrangement.strides)
        )

    def _set(self, plan: Any) -> None:
        self.plan, self.plan_address = plan, plan.buffer_info()[0]

    def resized(self, shape: torch.Size) -> Launch | None:
        """The same for contiguous tensors of another shape, in a fraction of the time that planning
        takes, if they are rows and both calls are small.
        """
        if not (self.is_resizable and len(shape) == 2 and _is_small(*shape)):
            return None
        batch, event = shape
        other = Launch.__new__(Launch)
        other.__dict__.update(self.__dict__)
        denominator = kl_denominator(self.reduction, batch, event)
        other._set(kernels.resized(self.plan, batch, event, denominator))
        return other

    def __call__(self, *addresses: int) -> None:
        """Run on as many threads as torch would use."""
        workers = torch.get_num_threads() if self.is_shared_out else 1
        memories = np.empty((workers, self.memory), self.dtype)
        scratch = np.zeros(self.scratch)
        arguments = memories, self.plan_address, scratch, *addresses
        if workers == 1:
            self.run(0, 1, *arguments)
        else:
            threads.run(self.run, workers, *arguments)


def _is_small(batch: int, event: int) -> bool:
    """One piece, of several rows: the strides of a single one say nothing of others."""
    return 1 < batch and event <= kernels.BLOCK and batch * (event + 3) <= SHARE
