"""The Triton backend: tensors to kernel arguments, one launch each way.

A plan is all that sizes, strides, dtypes and options decide; it allocates, and launches the kernel
that its first call compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vaekl.kernels.backward import backward_kernel
from vaekl.kernels.forward import counter_count, forward_kernel, scratch_size

from . import _layout
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
from ._workspace import workspaces

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@lru_cache
def _warp_size() -> int:
    """32 on NVIDIA, 64 on AMD's data-centre GPUs; any number under the interpreter."""
    if triton.knobs.runtime.interpret:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)


# Which tensors of a kernel may lie anywhere. For p_dkl and p_dkl_of_mean it compiles nothing else.
_FORWARD_ANYWHERE = (0, 1, 2)  # mu, logvar, eps
_BACKWARD_ANYWHERE = (0, 1, 2, 3, 6, 7)  # those, dz, and what was saved: state, means
_INTO = (8, 9)  # dmu, dlogvar


class Launch:
    """A kernel with all but its tensors and its key fixed."""

    def __init__(self, kernel: Any, grid: _layout.Grid, fixed: Sequence[Any]) -> None:
        self.kernel = kernel
        self.grid = (grid.tiles, grid.ranges, 1)
        self.fixed = (*fixed, grid.block_rows, grid.block_cols)
        # FMA contraction is part of the error budget; Triton's default for it changes in 3.10.
        warps = max(1, grid.threads // _warp_size())
        self.options = {"num_warps": warps, "enable_fp_fusion": True}
        self.compiled: Any = None

    def __call__(
        self, tensors: Sequence[Tensor | None], anywhere: Sequence[int], *key: int
    ) -> None:
        """Launch on the current stream; `key` is what follows the tensors.

        The tensors `anywhere` are the caller's, or have been through its hooks, and may lie at any
        address; the others are allocated for the call. For pointers that are not 16-byte aligned
        Triton compiles another kernel; those take its ordinary launch, which finds it. Nothing else
        that a kernel is compiled for is left open by a plan.
        """
        address = 0
        for i in anywhere:
            tensor = tensors[i]
            if tensor is not None:
                address |= tensor.data_ptr()
        try:
            if self.compiled is not None and address % 16 == 0:
                self.compiled(*tensors, *key, *self.fixed)
            else:
                compiled = self.kernel[self.grid](*tensors, *key, *self.fixed, **self.options)
                if compiled is not None and address % 16 == 0:  # the interpreter compiles nothing
                    self.compiled = compiled[self.grid]
        except BaseException:
            workspaces.forget()
            raise


def is_elsewhere(tensor: Tensor) -> bool:
    """On a CUDA device that is not the current one: nothing may be launched there as it stands."""
    return tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()


def _size_args(view: _layout.View, grid: _layout.Grid, options: Options) -> list[Any]:
    """lo, hi, B, D, inner, rows_per_range, kl_denominator."""
    return [
        *(options.clamp or (0.0, 0.0)),
        view.batch,
        view.event,
        view.inner,
        grid.rows_per_range,
        kl_denominator(options.reduction, view.batch, view.event),
    ]


def _flag_args(view: _layout.View, dtype: torch.dtype, options: Options) -> list[Any]:
    """CLAMP, SPLIT_EVENT, WIDE, DTYPE."""
    return [options.clamp is not None, view.split, view.wide, _TRITON_DTYPES[dtype]]


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
        self.dtype = compute_dtype(mu, logvar, eps)
        view = arrangement.view
        grid = _layout.grid(view.batch, view.event, _layout.current_config())
        per_row = options.reduction == "none"
        split_rows, split_cols = grid.ranges > 1, grid.tiles > 1
        fixed = [
            *_size_args(view, grid, options),
            *chain(*arrangement.strides),
            per_row,
            options.mean_over or "none",
            split_rows,
            split_cols,
            *_flag_args(view, self.dtype, options),
        ]
        self.launch = Launch(forward_kernel, grid, fixed)
        self.new_z: Callable[[Tensor], Tensor] | None = None
        if options.sample:
            self.new_z = allocator(mu, sample_dtype(mu, logvar, eps))
        self.kl = self.means = None
        if options.reduction is not None:
            self.kl = dense(mu.shape[: options.batch_dims] if per_row else ())
        if options.mean_over is not None:
            self.means = dense((2, view.event) if options.mean_over == "batch" else (2,))
        column_sums = view.event if options.mean_over == "batch" else 0
        row_sums = view.batch if per_row else 0
        self.scratch_size = scratch_size(grid.tiles, grid.ranges, column_sums, row_sums)
        self.counter_count = counter_count(grid.tiles, grid.ranges)

    def __call__(
        self,
        mu: Tensor,
        logvar: Tensor,
        eps: Tensor | None,
        generator: torch.Generator | None,
        seed: int | None,
    ) -> Forward:
        """(z, kl, kl_of_mean, state, means); state is the noise key, int64[2]. None: not wanted."""
        if is_elsewhere(mu):
            with torch.cuda.device(mu.device):
                return self(mu, logvar, eps, generator, seed)
        device, dtype = mu.device, self.dtype
        z = kl = kl_of_mean = state = means = noise_key = scratch = counters = None
        word = offset = 0
        if self.new_z is not None:
            z = self.new_z(mu)
            if eps is None:
                word, offset, noise_key = draw_key(device, generator, seed)
                state = torch.empty_strided((2,), (1,), dtype=torch.int64, device=device)
        if self.kl is not None:
            kl = torch.empty_strided(*self.kl, dtype=dtype, device=device)
        if self.means is not None:
            kl_of_mean = torch.empty_strided((), (), dtype=dtype, device=device)
            means = torch.empty_strided(*self.means, dtype=dtype, device=device)
        if self.scratch_size:
            scratch, counters = workspaces.get(device, dtype, self.scratch_size, self.counter_count)
        on_device = noise_key is not None
        p_key = noise_key if on_device else state
        tensors = (mu, logvar, eps, z, kl, kl_of_mean, means, state, p_key, scratch, counters)
        self.launch(tensors, _FORWARD_ANYWHERE, word, offset, int(on_device))
        return z, kl, kl_of_mean, state, means


plan_forward = forward_planner(ForwardPlan)


def _prepare_backward(
    arrangement: Arrangement,
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    dz: Tensor | None,
    options: Options,
    has_into: bool,
) -> Callable[..., None]:
    view = arrangement.view
    grid = _layout.grid(view.batch, view.event, _layout.current_config())
    fixed = [
        *_size_args(view, grid, options),
        arrangement.dkl_row,
        *chain(*arrangement.strides),
        options.reduction == "none",
        options.mean_over or "none",
        *_flag_args(view, compute_dtype(mu, logvar, eps), options),
    ]
    launch = Launch(backward_kernel, grid, fixed)
    anywhere = _BACKWARD_ANYWHERE + (_INTO if has_into else ())

    def run(*tensors: Tensor | None) -> None:
        mu = tensors[0]
        if mu is not None and is_elsewhere(mu):
            with torch.cuda.device(mu.device):
                launch(tensors, anywhere)
        else:
            launch(tensors, anywhere)

    return run


plan_backward = backward_planner(_prepare_backward)
