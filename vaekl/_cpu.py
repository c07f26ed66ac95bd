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
from ._memory import empty_like
from ._noise import draw_key
from ._options import Options, compute_dtype, kl_denominator, sample_dtype
from ._plans import (
    UNKNOWN,
    Arrangement,
    arrange_backward,
    arrange_forward,
    backward_of_copies,
    empty_gradients,
    forward_of_copies,
    layout,
    remember,
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
        kernel: Callable[..., None],
        arrangement: Arrangement,
        dtypes: list[torch.dtype],
        options: Options,
        numbers: np.ndarray[Any, Any],
        buffers: int = kernels.BUFFERS,
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
        shape = (batch, event, view.inner, tile_cols, range_rows)
        denominator = kl_denominator(options.reduction, batch, event)
        flags = (chunk, per_row, _MEAN_OVER[options.mean_over], options.clamp is not None)
        tensors = [(_KINDS[d], *strides) for d, strides in zip(dtypes, arrangement.strides)]
        flat = (*shape, *flags, denominator, arrangement.dkl_row, *chain.from_iterable(tensors))
        self.kernel, self.numbers = kernel, numbers
        self.plan = np.array(flat, np.int64)
        self.own = buffers * block
        self.tiles, self.ranges = tiles, ranges
        self.is_shared_out = tiles * ranges > chunk
        self.shared = kernels.TILES + tiles

    def __call__(self, *addresses: int) -> None:
        """Run on as many threads as torch would use."""
        threads = torch.get_num_threads() if self.is_shared_out else 1
        works = np.empty((threads, self.own), self.numbers.dtype)
        shared = np.zeros(self.shared)
        _threads.run(self.kernel, threads, works, self.numbers, self.plan, shared, *addresses)


def _numbers(dtype: torch.dtype, options: Options) -> np.ndarray[Any, Any]:
    """The bounds of clamp in the computation's dtype."""
    return np.array(options.clamp or (0, 0), str(dtype).removeprefix("torch."))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dtype(tensor: Tensor | None) -> torch.dtype:
    return torch.float32 if tensor is None else tensor.dtype


class _ForwardPlan(NamedTuple):
    launch: Launch
    z_dtype: torch.dtype
    kl_shape: tuple[int, ...]
    scalar: Tensor  # like a reduced KL
    means: Tensor  # of the shape of the mean vectors


class _BackwardPlan(NamedTuple):
    launch: Launch
    like_mu: bool  # all gradients have its layout


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
    launch = Launch(kernels.forward, arrangement, dtypes, options, _numbers(dtype, options))
    # Sums, as `divided` in kernels/cpu_forward.py has them.
    batch, event = arrangement.view.batch, arrangement.view.event
    launch.shared += 3 * launch.tiles * launch.ranges
    launch.shared += launch.tiles * batch if options.reduction == "none" and launch.tiles > 1 else 0
    launch.shared += 2 * launch.ranges * event if options.mean_over == "batch" else 0
    return _ForwardPlan(
        launch=launch,
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
        return forward_of_copies(forward, mu, logvar, eps, generator, seed, options)

    z = kl = kl_of_mean = state = means = None
    word = offset = 0
    scalar = plan.scalar
    if options.sample:
        z = empty_like(mu, plan.z_dtype)
        if eps is None:
            word, offset, _ = draw_key(mu.device, generator, seed)
            state = torch.empty_like(_STATE)
    if options.reduction == "none":
        kl = torch.empty(plan.kl_shape, dtype=scalar.dtype, device="cpu")
    elif options.reduction is not None:
        kl = torch.empty_like(scalar)
    if options.mean_over is not None:
        kl_of_mean = torch.empty_like(scalar)
        means = empty_like(plan.means, scalar.dtype)
    plan.launch(
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
        launch=Launch(kernels.backward, arrangement, dtypes, options, _numbers(dtype, options)),
        like_mu=arrangement.like_mu,
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
    inputs = (mu, logvar, eps)
    signatures = (mu.shape, mu.stride(), mu.dtype, signature(logvar), signature(eps))
    key = (signatures, signature(dz), signature(dkl), options, needs, layout(into))
    plan = _backward_plans.get(key, UNKNOWN)
    if plan is UNKNOWN:
        plan = _plan_backward(mu, logvar, eps, dz, dkl, options, needs, into)
        remember(_backward_plans, key, plan)
    if plan is None:
        upstream, kept = (dz, dkl, dkl_of_mean), (state, means)
        return backward_of_copies(backward, inputs, upstream, kept, options, needs, into)

    dmu, dlogvar, deps = empty_gradients(inputs, needs, plan.like_mu, into)
    plan.launch(
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
