"""The cpu backend: tensors to arguments of the numba kernels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vaekl.kernels import cpu as kernels

from . import _slices, _threads
from ._eager import Forward
from ._memory import allocator
from ._noise import draw_key
from ._options import Options, compute_dtype, kl_denominator, sample_dtype
from ._plans import (
    Arrangement,
    backward_planner,
    dense,
    forward_planner,
)

_KINDS = {
    torch.float32: kernels.F32,
    torch.float64: kernels.F64,
    torch.bfloat16: kernels.BF16,
    torch.float16: kernels.F16,
}
NO_BOUNDS = (0.0, 0.0)  # read by nobody
_STATE = torch.empty(2, dtype=torch.int64, device="cpu")
_MEAN_OVER = {None: kernels.NONE, "batch": kernels.BATCH, "all": kernels.ALL}
#: Elements that a worker takes at a time: few enough to share out, many enough to be worth it.
#: bench/cpu.py ("threads") shows two threads to be worth it from two shares on.
SHARE = 16384
#: Row ranges times column tiles, at most: each has sums of its own.
MOST_PIECES = 512
#: Rows of a range where each column has sums of its own, which are few bytes beside so many rows;
#: fewer if there would not be as many ranges.
ROWS_OF_SUMS, RANGES_OF_SUMS = 32, 16


class Launch:
    """A kernel with all but its addresses fixed."""

    def __init__(
        self,
        kernel: kernels.Kernel,
        arrangement: Arrangement,
        dtypes: list[torch.dtype],
        options: Options,
        dtype: torch.dtype,
        bounds: tuple[float, float],
    ) -> None:
        view, block = arrangement.view, kernels.BLOCK
        batch, event = view.batch, view.event
        per_row, least = options.reduction == "none", 1
        if options.mean_over == "batch":
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
            per_row,
            _MEAN_OVER[options.mean_over],
            kl_denominator(options.reduction, batch, event),
            arrangement.dkl_row,
            options.clamp is not None,
            *bounds,
        )
        layouts = [(_KINDS[d], *strides) for d, strides in zip(dtypes, arrangement.strides)]
        self.run, self.dtype = kernel.run, np.dtype(str(dtype).removeprefix("torch."))
        self.plan = kernels.pack(plan, layouts)  # kept for its address
        self.plan_address = self.plan.buffer_info()[0]
        self.memory, self.scratch = kernel.buffers * block, kernel.scratch_size(plan)
        self.is_shared_out = tiles * ranges > chunk

    def __call__(self, *addresses: int) -> None:
        """Run on as many threads as torch would use."""
        threads = torch.get_num_threads() if self.is_shared_out else 1
        memories = np.empty((threads, self.memory), self.dtype)
        scratch = np.zeros(self.scratch)
        _threads.run(self.run, threads, memories, self.plan_address, scratch, *addresses)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dtype(tensor: Tensor | None) -> torch.dtype:
    return torch.float32 if tensor is None else tensor.dtype


class ForwardPlan:
    """Forward of tensors like these."""

    def __init__(
        self,
        arrangement: Arrangement,
        mu: Tensor,
        logvar: Tensor,
        eps: Tensor | None,
        options: Options,
    ) -> None:
        dtype, z_dtype = compute_dtype(mu, logvar, eps), sample_dtype(mu, logvar, eps)
        dtypes = [mu.dtype, logvar.dtype, _dtype(eps), z_dtype]
        bounds = options.clamp or NO_BOUNDS
        self.launch = Launch(kernels.FORWARD, arrangement, dtypes, options, dtype, bounds)
        event, by_column = arrangement.view.event, options.mean_over == "batch"
        scalar = torch.empty((), dtype=dtype, device="cpu")
        self.scalar = scalar
        self.kl = self.means = None
        if options.reduction is not None:
            self.kl = dense(mu.shape[: options.batch_dims] if options.reduction == "none" else ())
        if options.mean_over is not None:
            # Expanded, what the means are like takes no memory, however large.
            self.means = scalar.expand((2, event) if by_column else (2,))
            self.new_means = allocator(self.means, dtype)
        self.new_z = allocator(mu, z_dtype) if options.sample else None

    def __call__(
        self,
        mu: Tensor,
        logvar: Tensor,
        eps: Tensor | None,
        generator: torch.Generator | None,
        seed: int | None,
    ) -> Forward:
        """(z, kl, kl_of_mean, state, means); state is the noise key, int64[2]. None: not wanted."""
        z = kl = kl_of_mean = state = means = None
        word = offset = 0
        if self.new_z is not None:
            z = self.new_z(mu)
            if eps is None:
                word, offset, _ = draw_key(mu.device, generator, seed)
                state = torch.empty_like(_STATE)
        if self.kl is not None:
            kl = torch.empty_strided(*self.kl, dtype=self.scalar.dtype, device="cpu")
        if self.means is not None:
            kl_of_mean = torch.empty_like(self.scalar)
            means = self.new_means(self.means)
        self.launch(
            mu.data_ptr(),
            logvar.data_ptr(),
            _address(eps),
            _address(z),
            _address(kl),
            _address(kl_of_mean),
            _address(means),
            _address(state),
            word,
            offset,
        )
        return z, kl, kl_of_mean, state, means


plan_forward = _slices.forward_planner(forward_planner(ForwardPlan))


def _prepare_backward(
    arrangement: Arrangement,
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    dz: Tensor | None,
    options: Options,
    _: bool,
) -> Callable[..., None]:
    inputs = [mu.dtype, logvar.dtype, _dtype(eps)]
    dtypes, dtype = [*inputs, _dtype(dz), *inputs], compute_dtype(mu, logvar, eps)
    bounds = options.clamp or NO_BOUNDS
    launch = Launch(kernels.BACKWARD, arrangement, dtypes, options, dtype, bounds)
    return lambda *tensors: launch(*map(_address, tensors))


plan_backward = _slices.backward_planner(backward_planner(_prepare_backward))
