"""The cpu backend: tensors to arguments of the numba kernels, and the threads that run them.

Threads are Python's, not numba's: its own pools do not survive a fork or two callers at once. The
kernels release the GIL. The calling thread always works; others join it for larger inputs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vaekl.kernels import cpu as kernels

from ._eager import Backward, Forward
from ._noise import draw_key
from ._options import Options, compute_dtype, kl_denominator, sample_dtype
from ._plans import (
    UNKNOWN,
    Arrangement,
    Strides,
    arrange_backward,
    arrange_forward,
    arranged,
    layout,
    remember,
    restored,
    signature,
)

_KINDS = {
    torch.float32: kernels.F32,
    torch.float64: kernels.F64,
    torch.bfloat16: kernels.BF16,
    torch.float16: kernels.F16,
}
_MEAN_OVER = {None: kernels.NONE, "batch": kernels.BATCH, "all": kernels.ALL}
_ABSENT = (0, 0, 0, 0, 0)
#: Elements of a piece: small enough to share out, large enough that its sums are few.
PIECE = 32768
#: Pieces for which another thread is woken: two take about 0.1 ms forward in float32, and waking
#: a thread on a busy machine was measured to cost up to half of that.
PIECES_PER_THREAD = 2

Layout = tuple[int, int, int, int]  # kind, row, outer, inner

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _forget_pool() -> None:
    """A forked child has none of its parent's threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


def _helpers(count: int) -> ThreadPoolExecutor:
    """A pool of `count` threads or more; a smaller one finishes what it has and goes."""
    global _pool, _pool_size
    pool = _pool
    if pool is None or _pool_size < count:
        if pool is not None:
            pool.shutdown(wait=False)
        pool = ThreadPoolExecutor(count, thread_name_prefix="vaekl")
        _pool, _pool_size = pool, count
    return pool


class Launch:
    """A kernel with all but its tensors and its key fixed."""

    def __init__(
        self, kernel: Callable[..., None], arrangement: Arrangement, dtype: torch.dtype, o: Options
    ) -> None:
        view = arrangement.view
        tiles = -(-view.event // kernels.BLOCK)
        tile_cols = -(-view.event // (4 * tiles)) * 4
        # Whole blocks of rows, where a block is more than one.
        step = max(kernels.BLOCK // tile_cols, 1) if tiles == 1 else 1
        range_rows = max(PIECE // (tile_cols * step), 1) * step
        self.ranges = -(-view.batch // range_rows)
        self.tiles = -(-view.event // tile_cols)
        self.pieces = self.tiles * self.ranges
        shape = (view.batch, view.event, view.inner, tile_cols, range_rows)
        options = (int(o.reduction == "none"), _MEAN_OVER[o.mean_over], int(o.clamp is not None))
        denominator = float(kl_denominator(o.reduction, view.batch, view.event))
        self.fixed = (shape, options, *(o.clamp or (0.0, 0.0)), denominator)
        self.kernel = kernel
        self.work = (kernels.BUFFERS, kernels.BLOCK), np.dtype(str(dtype).removeprefix("torch."))

    def _work(self, arguments: tuple[Any, ...], keep: Any) -> None:
        """Be one worker. `keep` holds the memory, whatever becomes of the caller."""
        self.kernel(np.empty(*self.work), *arguments)

    def __call__(self, arguments: tuple[Any, ...], keep: Any) -> None:
        """Run on as many threads as torch would use."""
        arguments = (np.zeros(2, np.int64), *arguments)
        helpers = min(torch.get_num_threads(), self.pieces // PIECES_PER_THREAD) - 1
        futures: list[Future[None]] = []
        if helpers > 0:
            pool = _helpers(helpers)
            futures = [pool.submit(self._work, arguments, keep) for _ in range(helpers)]
        self._work(arguments, keep)
        for future in futures:
            # One that has not begun by now would find nothing left to do.
            if not future.cancel():
                future.result()


class _ForwardPlan(NamedTuple):
    launch: Launch
    layouts: list[Layout]  # of mu, logvar, eps, z
    dtype: torch.dtype
    z_stride: Strides
    z_dtype: torch.dtype
    kl_shape: Strides
    means_shape: Strides
    scratch_size: int


class _BackwardPlan(NamedTuple):
    launch: Launch
    layouts: list[Layout]  # of mu, logvar, eps, dz, dmu, dlogvar, deps
    strides: list[Strides]  # of dmu, dlogvar, deps
    dkl_row: int


_forward_plans: dict[Any, _ForwardPlan | None] = {}
_backward_plans: dict[Any, _BackwardPlan | None] = {}


def _operand(tensor: Tensor | None, layout: Layout) -> tuple[int, int, int, int, int]:
    return _ABSENT if tensor is None else (tensor.data_ptr(), *layout)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _layouts(arrangement: Arrangement, dtypes: list[torch.dtype]) -> list[Layout]:
    return [(_KINDS[d], *strides) for d, strides in zip(dtypes, arrangement.strides)]


def _dtype(tensor: Tensor | None) -> torch.dtype:
    return torch.float32 if tensor is None else tensor.dtype


def _plan_forward(
    mu: Tensor, logvar: Tensor, eps: Tensor | None, options: Options
) -> _ForwardPlan | None:
    """None where a tensor has to be copied first."""
    arrangement = arrange_forward(mu, logvar, eps, options)
    if arrangement is None:
        return None
    view, dtype = arrangement.view, compute_dtype(mu, logvar, eps)
    z_dtype = sample_dtype(mu, logvar, eps)
    launch = Launch(kernels.forward, arrangement, dtype, options)
    per_row = options.reduction == "none"
    # The layout of scratch is in kernels/cpu.py.
    scratch_size = 3 * launch.pieces + (launch.tiles * view.batch if per_row else 0)
    scratch_size += 2 * launch.ranges * view.event if options.mean_over == "batch" else 0
    return _ForwardPlan(
        launch=launch,
        layouts=_layouts(arrangement, [mu.dtype, logvar.dtype, _dtype(eps), z_dtype]),
        dtype=dtype,
        z_stride=arrangement.like[0],
        z_dtype=z_dtype,
        kl_shape=tuple(mu.shape[: options.batch_dims]) if per_row else (),
        means_shape=(2, view.event) if options.mean_over == "batch" else (2,),
        scratch_size=scratch_size,
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
    key = (mu.shape, mu.stride(), mu.dtype, signature(logvar), signature(eps), options)
    plan = _forward_plans.get(key, UNKNOWN)
    if plan is UNKNOWN:
        plan = _plan_forward(mu, logvar, eps, options)
        remember(_forward_plans, key, plan)
    if plan is None:
        dense, (logvar, eps) = arranged(mu, (logvar, eps), options.batch_dims)
        z, *others = forward(dense, logvar, eps, generator, seed, options)
        return restored(z, mu), others[0], others[1], others[2], others[3]

    z = kl = kl_of_mean = state = means = None
    word = offset = 0
    if options.sample:
        z = torch.empty_strided(mu.shape, plan.z_stride, dtype=plan.z_dtype, device="cpu")
        if eps is None:
            word, offset, _ = draw_key(mu.device, generator, seed)
            state = torch.empty(2, dtype=torch.int64, device="cpu")
    if options.reduction is not None:
        kl = torch.empty(plan.kl_shape, dtype=plan.dtype, device="cpu")
    if options.mean_over is not None:
        kl_of_mean = torch.empty((), dtype=plan.dtype, device="cpu")
        means = torch.empty(plan.means_shape, dtype=plan.dtype, device="cpu")
    tensors = (mu, logvar, eps, z)
    results = (kl, kl_of_mean, means, state)
    arguments = (
        np.empty(plan.scratch_size),
        *map(_operand, tensors, plan.layouts),
        *map(_address, results),
        *plan.launch.fixed,
        word,
        offset,
    )
    plan.launch(arguments, (tensors, results))
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
) -> _BackwardPlan | None:
    """None where a tensor has to be copied first."""
    arrangement = arrange_backward(mu, logvar, eps, dz, dkl, options, needs, into)
    if arrangement is None:
        return None
    inputs = [mu.dtype, logvar.dtype, _dtype(eps)]
    return _BackwardPlan(
        launch=Launch(kernels.backward, arrangement, compute_dtype(mu, logvar, eps), options),
        layouts=_layouts(arrangement, [*inputs, _dtype(dz), *inputs]),
        strides=arrangement.like,
        dkl_row=arrangement.dkl_row,
    )


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
    needs = (needs[0], needs[1], needs[2] and dz is not None)
    inputs = (mu.shape, mu.stride(), mu.dtype, signature(logvar), signature(eps))
    key = (inputs, signature(dz), signature(dkl), options, needs, layout(into))
    plan = _backward_plans.get(key, UNKNOWN)
    if plan is UNKNOWN:
        plan = _plan_backward(mu, logvar, eps, dz, dkl, options, needs, into)
        remember(_backward_plans, key, plan)
    if plan is None:
        model, (logvar_, eps_, dz) = arranged(mu, (logvar, eps, dz), options.batch_dims)
        dkl = None if dkl is None else dkl.contiguous()
        results = backward(model, logvar_, eps_, dz, dkl, dkl_of_mean, state, means, options, needs)
        return (
            restored(results[0], mu, None if into is None else into[0]),
            restored(results[1], logvar, None if into is None else into[1]),
            restored(results[2], eps),
        )

    own = needs if into is None else (False, False, needs[2])
    gradients = [
        torch.empty_strided(mu.shape, stride, dtype=like.dtype, device="cpu")
        if need and like is not None
        else None
        for like, need, stride in zip((mu, logvar, eps), own, plan.strides)
    ]
    if into is not None:
        gradients[:2] = into
    tensors = (mu, logvar, eps, dz, *gradients)
    scalars = (dkl_of_mean, means, state)
    arguments = (
        *map(_operand, tensors, plan.layouts),
        _address(dkl),
        plan.dkl_row,
        *map(_address, scalars),
        *plan.launch.fixed,
    )
    plan.launch(arguments, (tensors, dkl, scalars))
    return gradients[0], gradients[1], gradients[2]
