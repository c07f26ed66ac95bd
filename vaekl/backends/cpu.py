"""The cpu backend: tensors to arguments of the numba kernels, one launch each way.

A plan is of all sizes: for each of them it keeps a launch, with all but its addresses fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from vaekl._noise import SEED_OFFSET, draw_key
from vaekl._spec import (
    LOGVAR_RANGE,
    Gradients,
    Into,
    Needs,
    Operands,
    Outputs,
    Saved,
    Source,
    Spec,
    Terms,
    compute_dtype,
    kl_denominator,
    sample_dtype,
)

from . import Backward, Forward, UnavailableError, remember, threads
from .memory import allocator
from .slices import backward_of_slices, forward_of_slices, of_slices
from .strided import (
    Arrangement,
    GradientMemory,
    arrange_backward,
    arrange_forward,
    arrange_inputs,
    arranged,
    backward_of_copies,
    dense,
    forward_of_copies,
)

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise UnavailableError(
        "needs numba's JIT, which is off (NUMBA_DISABLE_JIT, numba.config.DISABLE_JIT or "
        ".numba_config.yaml)"
    )

from vaekl.kernels import cpu as kernels

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
_NO_BOUNDS = (0.0, 0.0)  # read by nobody
_MEAN_OVER = {None: kernels.NONE, "batch": kernels.BATCH, "all": kernels.ALL}
#: Elements that a worker takes at a time: few enough to share out, many enough to be worth it.
#: bench/cpu.py ("threads") shows two threads to be worth it from two shares on.
SHARE = 16384
#: Row ranges times column tiles, at most: each has sums of its own.
MOST_PIECES = 512
#: Rows of a range where each column has sums of its own, which are few bytes beside so many rows;
#: fewer if there would not be as many ranges.
ROWS_OF_SUMS, RANGES_OF_SUMS = 32, 16


def why_not(device: str) -> str | None:
    """Nothing, once it is imported."""
    return None


class _Launch:
    """A kernel with all but its addresses fixed; `dtypes`: of the tensors arranged, in order."""

    def __init__(
        self,
        kernel: kernels.Kernel,
        spec: Spec,
        arrangement: Arrangement,
        dtypes: Sequence[torch.dtype],
        dtype: torch.dtype,
        bounds: tuple[float, float],
    ) -> None:
        view, block = arrangement.view, kernels.BLOCK
        batch, event = view.batch, view.event
        least = 1
        if spec.mean_over == "batch":
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
            _MEAN_OVER[spec.mean_over],
            kl_denominator(spec.reduction, batch, event),
            arrangement.dkl_row,
            kernels.FORMS[spec.form],
            *bounds,
        )
        layouts = [(_KINDS[d], *strides) for d, strides in zip(dtypes, arrangement.strides)]
        self.run, self.dtype = kernel.run, _NUMPY[dtype]
        self.plan = kernels.pack(plan, layouts)
        self.plan_address = self.plan.buffer_info()[0]
        self.memory, self.scratch = kernel.buffers * block, kernel.scratch_size(plan)
        self.is_shared_out = tiles * ranges > chunk

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


def _dtype(tensor: Tensor | None) -> torch.dtype:
    return torch.float32 if tensor is None else tensor.dtype


class _SizedForward:
    """What a shape decides of a forward."""

    def __init__(self, spec: Spec, arrangement: Arrangement, x: Operands) -> None:
        dtype, z_dtype = compute_dtype(*x), sample_dtype(*x)
        dtypes = (x.mu.dtype, x.scale.dtype, _dtype(x.eps), z_dtype)
        bounds = spec.clamp or _NO_BOUNDS
        self.launch = _Launch(kernels.FORWARD, spec, arrangement, dtypes, dtype, bounds)
        self.new_z = allocator(x.mu, z_dtype) if spec.sample else None
        self.kl = self.means = None
        if spec.reduction == "none":
            self.kl = dense(x.mu.shape[: spec.batch_dims])
        if spec.mean_over is not None:
            # Expanded, what the means are like takes no memory, however large.
            means = (2, arrangement.view.event) if spec.mean_over == "batch" else (2,)
            self.means = torch.empty((), dtype=dtype, device="cpu").expand(means)
            self.new_means = allocator(self.means, dtype)


class _ForwardPlan:
    def __init__(self, spec: Spec, x: Operands) -> None:
        self.spec = spec
        # What results are like. (No module's constants, which would be made in a mode of a caller.)
        self.scalar = torch.empty((), dtype=compute_dtype(*x), device="cpu")
        self.key = torch.empty(2, dtype=torch.int64, device="cpu")
        self.sized: dict[torch.Size, _SizedForward] = {}

    def __call__(self, x: Operands, source: Source) -> tuple[Outputs, Saved]:
        mu, scale, eps = x
        sized = self.sized.get(mu.shape)
        if sized is None:
            sized = self._of_size(x)
        z = kl = kl_of_mean = key = means = None
        seed = offset = 0
        if sized.new_z is not None:
            z = sized.new_z(mu)
            if eps is None:
                if source.seed is None:
                    seed, offset, _ = draw_key(mu.device, source)
                else:  # as there, in a third of the time
                    seed, offset = source.seed, SEED_OFFSET
                key = torch.empty_like(self.key)
        if sized.kl is not None:
            kl = torch.empty_strided(*sized.kl, dtype=self.scalar.dtype, device="cpu")
        elif self.spec.reduction is not None:
            kl = torch.empty_like(self.scalar)
        if sized.means is not None:
            kl_of_mean = torch.empty_like(self.scalar)
            means = sized.new_means(sized.means)
        sized.launch(
            mu.data_ptr(),
            scale.data_ptr(),
            0 if eps is None else eps.data_ptr(),
            0 if z is None else z.data_ptr(),
            0 if kl is None else kl.data_ptr(),
            0 if kl_of_mean is None else kl_of_mean.data_ptr(),
            0 if means is None else means.data_ptr(),
            0 if key is None else key.data_ptr(),
            seed,
            offset,
        )
        return Outputs(z, kl, kl_of_mean), Saved(key, means)

    def _of_size(self, x: Operands) -> _SizedForward:
        arrangement = arrange_forward(self.spec, x)
        if arrangement is None:
            raise RuntimeError("tensors of another layout than those that were planned for")
        sized = _SizedForward(self.spec, arrangement, x)
        remember(self.sized, x.mu.shape, sized)
        return sized


def forward(spec: Spec, x: Operands) -> Forward:
    """A plan for tensors like these."""
    if arrange_forward(spec, x) is not None:
        return _ForwardPlan(spec, x)
    part = of_slices(spec, x)
    if part is None:
        return forward_of_copies(spec, forward)
    return forward_of_slices(part, x, forward)


class _BackwardPlan:
    def __init__(self, spec: Spec, needs: Needs) -> None:
        self.spec, self.needs = spec, needs
        self.sized: dict[torch.Size, tuple[_Launch, GradientMemory]] = {}

    def __call__(
        self, x: Operands, saved: Saved, upstream: Outputs, into: Into | None
    ) -> Gradients:
        sized = self.sized.get(x.mu.shape)
        if sized is None:
            sized = self._of_size(x, upstream, into)
        launch, new_gradients = sized
        gradients = new_gradients(x, into)
        mu, scale, eps = x
        dz, dkl, dkl_of_mean = upstream
        key, means, _ = saved
        d_mu, d_scale, d_eps = gradients
        launch(
            mu.data_ptr(),
            scale.data_ptr(),
            0 if eps is None else eps.data_ptr(),
            0 if dz is None else dz.data_ptr(),
            0 if dkl is None else dkl.data_ptr(),
            0 if dkl_of_mean is None else dkl_of_mean.data_ptr(),
            0 if key is None else key.data_ptr(),
            0 if means is None else means.data_ptr(),
            0 if d_mu is None else d_mu.data_ptr(),
            0 if d_scale is None else d_scale.data_ptr(),
            0 if d_eps is None else d_eps.data_ptr(),
        )
        return gradients

    def _of_size(
        self, x: Operands, upstream: Outputs, into: Into | None
    ) -> tuple[_Launch, GradientMemory]:
        spec = self.spec
        arrangement = arrange_backward(spec, x, upstream, self.needs, into)
        if arrangement is None:
            raise RuntimeError("tensors of another layout than those that were planned for")
        inputs = (x.mu.dtype, x.scale.dtype, _dtype(x.eps))
        dtypes, bounds = (*inputs, _dtype(upstream.z), *inputs), spec.clamp or _NO_BOUNDS
        launch = _Launch(kernels.BACKWARD, spec, arrangement, dtypes, compute_dtype(*x), bounds)
        sized = launch, GradientMemory(x, self.needs, arrangement.like_mu)
        remember(self.sized, x.mu.shape, sized)
        return sized


def backward(
    spec: Spec, x: Operands, upstream: Outputs, needs: Needs, into: Into | None
) -> Backward:
    """A plan for tensors like these."""
    if arrange_backward(spec, x, upstream, needs, into) is not None:
        return _BackwardPlan(spec, needs)
    part = of_slices(spec, x)
    if part is None or upstream.kl is None:
        return backward_of_copies(spec, needs, backward)
    return backward_of_slices(part, x, upstream.kl, needs, into, backward)


def statistics(mu: Tensor, logvar: Tensor, batch_dims: int) -> Tensor:
    """The rows of ``diagnostics.statistics.ROWS``, float64 [9, D]."""
    arrangement = arrange_inputs(mu, logvar, batch_dims)
    if arrangement is None:
        (mu, logvar, _), _ = arranged(Operands(mu, logvar), None, batch_dims)
        return statistics(mu, logvar, batch_dims)
    shape = (kernels.COLUMN_SUMS + 1, arrangement.view.event)
    out = torch.empty(shape, dtype=torch.float64, device="cpu")
    spec = Spec(*Terms(), batch_dims, "logvar", None, "cpu")
    dtypes, bounds = (mu.dtype, logvar.dtype), LOGVAR_RANGE
    launch = _Launch(kernels.STATISTICS, spec, arrangement, dtypes, torch.float64, bounds)
    launch(mu.data_ptr(), logvar.data_ptr(), out.data_ptr())
    return out
