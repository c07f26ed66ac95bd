"""The Triton backend: tensors to kernel arguments, one launch each way.

What sizes, strides, dtypes and options decide is worked out once and kept as a plan; a call looks
its plan up, allocates, and launches the kernel that the plan's first call compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vaekl.kernels.backward import backward_kernel
from vaekl.kernels.forward import forward_kernel

from . import _layout
from ._eager import Backward, Forward
from ._memory import empty_like
from ._noise import draw_key
from ._options import Options, compute_dtype, kl_denominator, sample_dtype
from ._plans import (
    UNKNOWN,
    Strides,
    arrange_backward,
    arrange_forward,
    backward_of_copies,
    empty_gradients,
    forward_of_copies,
    layout,
    remember,
    signature,
)
from ._workspace import workspaces

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@lru_cache
def _warp_size() -> int:
    """32 on NVIDIA, 64 on AMD's data-centre GPUs; any number under the interpreter."""
    if triton.knobs.runtime.interpret:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)


class Launch:
    """A kernel with all but its tensors and its key fixed."""

    def __init__(self, kernel: Any, grid: _layout.Grid, fixed: Sequence[Any]) -> None:
        self.kernel = kernel
        self.grid = (grid.tiles, grid.ranges, 1)
        self.fixed = (*fixed, grid.block_rows, grid.block_cols)
        # FMA contraction is part of the error budget; Triton's default for it changes in 3.10.
        self.options = {"num_warps": grid.threads // _warp_size(), "enable_fp_fusion": True}
        self.compiled: Any = None

    def __call__(self, tensors: Sequence[Tensor | None], inputs: int, *key: int) -> None:
        """Launch on the current stream; `key` is what follows the tensors.

        The first `inputs` tensors are the caller's and may lie anywhere. For pointers that are not
        16-byte aligned Triton compiles another kernel; those take its ordinary launch, which finds
        it. Nothing else that a kernel is compiled for is left open by a plan.
        """
        address = 0
        for tensor in tensors[:inputs]:
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


class _ForwardPlan(NamedTuple):
    launch: Launch
    dtype: torch.dtype
    z_dtype: torch.dtype
    kl_shape: Strides
    means: tuple[Strides, Strides]  # shape and strides
    scratch_size: int  # 0 where one program does it all
    counter_count: int


class _BackwardPlan(NamedTuple):
    launch: Launch
    like_mu: bool  # all gradients have its layout


_forward_plans: dict[Any, _ForwardPlan | None] = {}
_backward_plans: dict[Any, _BackwardPlan | None] = {}


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


def _plan_forward(
    mu: Tensor, logvar: Tensor, eps: Tensor | None, options: Options, config: _layout.Config
) -> _ForwardPlan | None:
    """None where a tensor has to be copied first."""
    dtype, z_dtype = compute_dtype(mu, logvar, eps), sample_dtype(mu, logvar, eps)
    arrangement = arrange_forward(mu, logvar, eps, options)
    if arrangement is None:
        return None
    view = arrangement.view
    grid = _layout.grid(view.batch, view.event, config)
    per_row = options.reduction == "none"
    split_rows, split_cols = grid.ranges > 1, grid.tiles > 1
    fixed = [
        *_size_args(view, grid, options),
        *chain(*arrangement.strides),
        per_row,
        options.mean_over or "none",
        split_rows,
        split_cols,
        *_flag_args(view, dtype, options),
    ]
    # The layout of scratch is in kernels/forward.py.
    scratch_size = 3 * grid.tiles * (grid.ranges + 1)
    scratch_size += 2 * grid.ranges * view.event if options.mean_over == "batch" else 0
    scratch_size += grid.tiles * view.batch if per_row else 0
    return _ForwardPlan(
        launch=Launch(forward_kernel, grid, fixed),
        dtype=dtype,
        z_dtype=z_dtype,
        kl_shape=tuple(mu.shape[: options.batch_dims]) if per_row else (),
        means=((2, view.event), (view.event, 1)) if options.mean_over == "batch" else ((2,), (1,)),
        scratch_size=scratch_size if split_rows or split_cols else 0,
        counter_count=1 + grid.tiles + grid.ranges,
    )


def forward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    options: Options,
) -> Forward:
    """(z, kl, kl_of_mean, state, means); state is the noise key, int64[2]. None: not wanted."""
    config, device = _layout.current_config(), mu.device
    if is_elsewhere(mu):
        with torch.cuda.device(device):
            return forward(mu, logvar, eps, generator, seed, options)
    signatures = (mu.stride(), mu.dtype, logvar.stride(), logvar.dtype, signature(eps))
    key = (mu.shape, signatures, device, options, config)
    plan = _forward_plans.get(key, UNKNOWN)
    if plan is UNKNOWN:
        plan = _plan_forward(mu, logvar, eps, options, config)
        remember(_forward_plans, key, plan)
    if plan is None:
        return forward_of_copies(forward, mu, logvar, eps, generator, seed, options)

    z = kl = kl_of_mean = state = means = noise_key = scratch = counters = None
    word = offset = 0
    if options.sample:
        z = empty_like(mu, plan.z_dtype)
        if eps is None:
            word, offset, noise_key = draw_key(device, generator, seed)
            state = torch.empty_strided((2,), (1,), dtype=torch.int64, device=device)
    # With strides given, torch.empty takes a quarter less of the host's time.
    if options.reduction == "none":
        kl = torch.empty(plan.kl_shape, dtype=plan.dtype, device=device)
    elif options.reduction is not None:
        kl = torch.empty_strided((), (), dtype=plan.dtype, device=device)
    if options.mean_over is not None:
        kl_of_mean = torch.empty_strided((), (), dtype=plan.dtype, device=device)
        means = torch.empty_strided(*plan.means, dtype=plan.dtype, device=device)
    if plan.scratch_size:
        scratch, counters = workspaces.get(
            device, plan.dtype, plan.scratch_size, plan.counter_count
        )
    on_device = noise_key is not None
    p_key = noise_key if on_device else state
    tensors = (mu, logvar, eps, z, kl, kl_of_mean, means, state, p_key, scratch, counters)
    plan.launch(tensors, 3, word, offset, int(on_device))
    return z, kl, kl_of_mean, state, means


def _plan_backward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    dz: Tensor | None,
    dkl: Tensor | None,
    options: Options,
    needs: tuple[bool, bool, bool],
    into: tuple[Tensor, Tensor] | None,
    config: _layout.Config,
) -> _BackwardPlan | None:
    """None where a tensor has to be copied first."""
    arrangement = arrange_backward(mu, logvar, eps, dz, dkl, options, needs, into)
    if arrangement is None:
        return None
    view = arrangement.view
    grid = _layout.grid(view.batch, view.event, config)
    fixed = [
        *_size_args(view, grid, options),
        arrangement.dkl_row,
        *chain(*arrangement.strides),
        options.reduction == "none",
        options.mean_over or "none",
        *_flag_args(view, compute_dtype(mu, logvar, eps), options),
    ]
    return _BackwardPlan(Launch(backward_kernel, grid, fixed), arrangement.like_mu)


def backward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    dz: Tensor | None,
    dkl: Tensor | None,
    dkl_of_mean: Tensor | None,
    state: Tensor | None,
    means: Tensor | None,
    options: Options,
    needs: tuple[bool, bool, bool],
    into: tuple[Tensor, Tensor] | None = None,
) -> Backward:
    """(dmu, dlogvar, deps), None where not needed; `into`: write the first two there."""
    config, device = _layout.current_config(), mu.device
    if is_elsewhere(mu):
        with torch.cuda.device(device):
            return backward(
                mu, logvar, eps, dz, dkl, dkl_of_mean, state, means, options, needs, into
            )
    needs = (needs[0], needs[1], needs[2] and dz is not None)
    inputs = (mu, logvar, eps)
    asked = (signature(dz), signature(dkl), dkl_of_mean is None)
    signatures = (mu.stride(), mu.dtype, logvar.stride(), logvar.dtype, signature(eps))
    key = (mu.shape, signatures, asked, device, options, needs, layout(into), config)
    plan = _backward_plans.get(key, UNKNOWN)
    if plan is UNKNOWN:
        plan = _plan_backward(mu, logvar, eps, dz, dkl, options, needs, into, config)
        remember(_backward_plans, key, plan)
    if plan is None:
        upstream, kept = (dz, dkl, dkl_of_mean), (state, means)
        return backward_of_copies(backward, inputs, upstream, kept, options, needs, into)

    dmu, dlogvar, deps = empty_gradients(inputs, needs, plan.like_mu, into)
    tensors = (mu, logvar, eps, dz, dkl, dkl_of_mean, state, means, dmu, dlogvar, deps)
    plan.launch(tensors, 4 if into is None else 10)  # halves of a tensor may lie anywhere too
    return dmu, dlogvar, deps
