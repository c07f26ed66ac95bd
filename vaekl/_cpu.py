"""The cpu backend: tensors to arguments of the numba kernels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vaekl.kernels import cpu as kernels

from . import _threads
from ._eager import Backward, Forward
from ._memory import use_huge_pages
from ._noise import draw_key
from ._options import Options, compute_dtype, kl_denominator, sample_dtype
from ._plans import (
    UNKNOWN,
    Arrangement,
    Strides,
    arrange_backward,
    arrange_forward,
    arranged,
    empty,
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
_STATE = torch.empty(2, dtype=torch.int64, device="cpu")
_MEAN_OVER = {None: kernels.NONE, "batch": kernels.BATCH, "all": kernels.ALL}
#: Elements that a worker takes at a time: few enough to share out, many enough to be worth it.
SHARE = 32768
#: Shares for which another thread is woken. That takes about 0.1 ms; bench/cpu.py ("threads")
#: shows two threads to be worth it from six shares on.
SHARES_PER_THREAD = 3
#: Row ranges times column tiles, at most: each range has column sums of its own.
MOST_PIECES = 512


class Launch:
    """A kernel with all but its addresses fixed."""

    def __init__(
        self,
        kernel: Callable[..., bool],
        arrangement: Arrangement,
        dtypes: list[torch.dtype],
        dtype: torch.dtype,
        options: Options,
    ) -> None:
        view, block = arrangement.view, kernels.BLOCK
        per_row, mean_over = options.reduction == "none", _MEAN_OVER[options.mean_over]
        tiles = -(-view.event // block)
        tile_cols = -(-view.event // (4 * tiles)) * 4
        tiles = -(-view.event // tile_cols)
        # Whole blocks of rows, where a block is more than one.
        step = max(block // tile_cols, 1) if tiles == 1 else 1
        range_rows = max(SHARE // tile_cols, -(-view.batch * tiles // MOST_PIECES), 1)
        range_rows = -(-range_rows // step) * step
        ranges = -(-view.batch // range_rows)
        pieces = tiles * ranges
        chunk = max(SHARE // (tile_cols * min(range_rows, view.batch)), 1)
        shape = (view.batch, view.event, view.inner, tile_cols, range_rows)
        denominator = kl_denominator(options.reduction, view.batch, view.event)
        flags = (chunk, per_row, mean_over, options.clamp is not None, denominator)
        tensors = [(_KINDS[d], *strides) for d, strides in zip(dtypes, arrangement.strides)]
        flat = (*shape, *flags, arrangement.dkl_row, *chain.from_iterable(tensors))
        self.kernel, self.buffers = kernel, kernels.BUFFERS
        self.plan = np.array(flat, np.int64)
        self.numbers = np.array(options.clamp or (0, 0), str(dtype).removeprefix("torch."))
        #: Counters and sums, as `forward` in kernels/cpu_forward.py divides them; backward's fit.
        self.shared = 3 + tiles + 3 * pieces
        self.shared += tiles * view.batch if per_row and tiles > 1 else 0
        self.shared += 2 * ranges * view.event if options.mean_over == "batch" else 0
        self.most_threads = pieces // chunk // SHARES_PER_THREAD

    def __call__(self, keep: Any, *addresses: int) -> None:
        """Run on as many threads as torch would use. `keep` holds what lies at the addresses."""
        shared = np.zeros(self.shared)

        def work() -> bool:
            own = np.empty(self.buffers * kernels.BLOCK, self.numbers.dtype)
            return self.kernel(own, self.numbers, self.plan, shared, *addresses)

        if self.most_threads < 2:
            work()
        else:
            _threads.share(work, min(torch.get_num_threads(), self.most_threads), keep)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dtype(tensor: Tensor | None) -> torch.dtype:
    return torch.float32 if tensor is None else tensor.dtype


class _ForwardPlan(NamedTuple):
    launch: Launch
    z_stride: Strides
    z_dtype: torch.dtype
    kl_shape: Strides
    scalar: Tensor  # like a reduced KL
    means: Tensor  # of the shape of the mean vectors


class _BackwardPlan(NamedTuple):
    launch: Launch
    strides: list[Strides]  # of dmu, dlogvar, deps


_forward_plans: dict[Any, _ForwardPlan | None] = {}
_backward_plans: dict[Any, _BackwardPlan | None] = {}


def _plan_forward(
    mu: Tensor, logvar: Tensor, eps: Tensor | None, options: Options
) -> _ForwardPlan | None:
    """None where a tensor has to be copied first."""
    arrangement = arrange_forward(mu, logvar, eps, options)
    if arrangement is None:
        return None
    dtype, z_dtype = compute_dtype(mu, logvar, eps), sample_dtype(mu, logvar, eps)
    scalar = torch.empty((), dtype=dtype, device="cpu")
    means_shape = (2, arrangement.view.event) if options.mean_over == "batch" else (2,)
    dtypes = [mu.dtype, logvar.dtype, _dtype(eps), z_dtype]
    return _ForwardPlan(
        launch=Launch(kernels.forward, arrangement, dtypes, dtype, options),
        z_stride=arrangement.like[0],
        z_dtype=z_dtype,
        kl_shape=tuple(mu.shape[: options.batch_dims]) if options.reduction == "none" else (),
        scalar=scalar,
        means=scalar.expand(means_shape),  # no memory, however wide
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
    scalar = plan.scalar
    if options.sample:
        z = use_huge_pages(empty(mu, plan.z_stride, plan.z_dtype))
        if eps is None:
            word, offset, _ = draw_key(mu.device, generator, seed)
            state = torch.empty_like(_STATE)
    if options.reduction == "none":
        kl = torch.empty(plan.kl_shape, dtype=scalar.dtype, device="cpu")
    elif options.reduction is not None:
        kl = torch.empty_like(scalar)
    if options.mean_over is not None:
        kl_of_mean = torch.empty_like(scalar)
        means = use_huge_pages(torch.empty_like(plan.means))
    plan.launch(
        (mu, logvar, eps, z, kl, kl_of_mean, means, state),
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
    dtypes, dtype = [*inputs, _dtype(dz), *inputs], compute_dtype(mu, logvar, eps)
    return _BackwardPlan(
        launch=Launch(kernels.backward, arrangement, dtypes, dtype, options),
        strides=arrangement.like,
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
    dmu, dlogvar, deps = (
        use_huge_pages(empty(like, stride, like.dtype)) if need and like is not None else None
        for like, need, stride in zip((mu, logvar, eps), own, plan.strides)
    )
    if into is not None:
        dmu, dlogvar = into
    plan.launch(
        (mu, logvar, eps, dz, dmu, dlogvar, deps, dkl, dkl_of_mean, means, state),
        mu.data_ptr(),
        logvar.data_ptr(),
        _address(eps),
        _address(dz),
        _address(dmu),
        _address(dlogvar),
        _address(deps),
        _address(dkl),
        _address(dkl_of_mean),
        _address(means),
        _address(state),
    )
    return dmu, dlogvar, deps
