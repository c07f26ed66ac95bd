"""The cpu backend: tensors to arguments of the numba kernels, one launch each way.

A plan is of all sizes: for each of them it keeps a launch, with all but its addresses fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numba
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
    kl_shape,
    sample_dtype,
    sizes,
)

from .memory import allocator
from .protocol import Backward, Forward, UnavailableError, remember
from .slices import backward_of_slices, forward_of_slices, of_slices
from .strided import (
    GradientMemory,
    Strides,
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

from . import cpu_log_prob as log_prob
from .launch import Launch, addresses, dtype_of, planned


def why_not(device: str) -> str | None:
    """Nothing, once it is imported."""
    return None


class _SizedForward(NamedTuple):
    """What a shape decides of a forward."""

    launch: Launch
    new_z: Callable[[Tensor], Tensor] | None
    kl: tuple[Strides, Strides] | None  # shape and strides, if it is no number
    means: Tensor | None  # what they are like
    new_means: Callable[[Tensor], Tensor]


class _ForwardPlan:
    def __init__(self, spec: Spec, x: Operands) -> None:
        self.spec = spec
        self.resizable: Launch | None = None
        # What results are like. (No module's constants, which would be made in a mode of a caller.)
        self.scalar = torch.empty((), dtype=compute_dtype(*x), device="cpu")
        self.key = torch.empty(2, dtype=torch.int64, device="cpu")
        self.sized: dict[torch.Size, _SizedForward] = {}

    def __call__(self, x: Operands, source: Source) -> tuple[Outputs, Saved]:
        mu, scale, eps, prior_mean, prior_scale = x
        sized = self.sized.get(mu.shape)
        if sized is None:
            sized = self._of_size(x)
        z = kl = kl_of_mean = key = means = None
        seed = offset = 0
        samples = source.samples
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
            0 if samples is None else samples.data_ptr(),
            *(() if prior_mean is None else addresses(prior_mean, prior_scale)),
        )
        return Outputs(z, kl, kl_of_mean), Saved(key, means)

    def _of_size(self, x: Operands) -> _SizedForward:
        spec, shape = self.spec, x.mu.shape
        launch = None if self.resizable is None else self.resizable.resized(shape)
        if launch is None:
            launch = self._planned(x)
        z_dtype, dtype = sample_dtype(*x[:3]), self.scalar.dtype
        new_z = allocator(x.mu, z_dtype) if spec.sample else None
        kl = dense(kl_shape(spec, shape)) if spec.reduction in ("none", "per_dim") else None
        means, new_means = None, allocator(self.scalar, dtype)
        if spec.mean_over is not None:
            # Expanded, what the means are like takes no memory, however large.
            event = sizes(shape, spec.batch_dims)[1]
            means = self.scalar.expand((2, event) if spec.mean_over == "batch" else (2,))
            new_means = allocator(means, dtype)
        sized = _SizedForward(launch, new_z, kl, means, new_means)
        remember(self.sized, shape, sized)
        return sized

    def _planned(self, x: Operands) -> Launch:
        spec = self.spec
        arrangement = planned(arrange_forward(spec, x))
        inputs, of_prior = [dtype_of(t) for t in x[:3]], [dtype_of(t) for t in x[3:]]
        dtypes = (*inputs, sample_dtype(*x[:3]), *of_prior)
        kernel = kernels.FORWARD if spec.prior is None else kernels.FORWARD_TO_PRIOR
        launch = Launch(kernel, spec, arrangement, dtypes, self.scalar.dtype, spec.clamp)
        if launch.is_resizable:
            self.resizable = launch
        return launch


def forward(spec: Spec, x: Operands) -> Forward:
    """A plan for tensors like these."""
    if arrange_forward(spec, x) is not None:
        return _ForwardPlan(spec, x) if spec.log_prob is None else log_prob.forward(spec, x)
    part = of_slices(spec, x)
    if part is None:
        return forward_of_copies(spec, forward)
    return forward_of_slices(part, x, forward)


class _BackwardPlan:
    def __init__(self, spec: Spec, needs: Needs, upstream: Outputs) -> None:
        self.spec, self.needs = spec, needs
        has_kl = upstream.kl is not None or upstream.kl_of_mean is not None
        self.to_prior = spec.prior is not None and has_kl  # z has no part in it
        self.resizable: tuple[Launch, GradientMemory] | None = None
        self.sized: dict[torch.Size, tuple[Launch, GradientMemory]] = {}

    def __call__(
        self, x: Operands, saved: Saved, upstream: Outputs, into: Into | None
    ) -> Gradients:
        sized = self.sized.get(x.mu.shape)
        if sized is None:
            sized = self._of_size(x, upstream, into)
        launch, new_gradients = sized
        gradients = new_gradients(x, into)
        mu, scale, eps, prior_mean, prior_scale = x
        dz, dkl, dkl_of_mean = upstream
        key, means, _, samples = saved
        d_mu, d_scale, d_eps, d_prior_mean, d_prior_scale = gradients
        of_prior: tuple[int, ...] = ()
        if self.to_prior:
            of_prior = addresses(prior_mean, prior_scale, d_prior_mean, d_prior_scale)
        launch(
            mu.data_ptr(),
            scale.data_ptr(),
            0 if eps is None else eps.data_ptr(),
            0 if dz is None else dz.data_ptr(),
            0 if dkl is None else dkl.data_ptr(),
            0 if dkl_of_mean is None else dkl_of_mean.data_ptr(),
            0 if key is None else key.data_ptr(),
            0 if means is None else means.data_ptr(),
            0 if samples is None else samples.data_ptr(),
            0 if d_mu is None else d_mu.data_ptr(),
            0 if d_scale is None else d_scale.data_ptr(),
            0 if d_eps is None else d_eps.data_ptr(),
            *of_prior,
        )
        return gradients

    def _of_size(
        self, x: Operands, upstream: Outputs, into: Into | None
    ) -> tuple[Launch, GradientMemory]:
        sized = None
        if self.resizable is not None:
            like, new_gradients = self.resizable
            launch = like.resized(x.mu.shape)
            sized = None if launch is None else (launch, new_gradients)
        if sized is None:
            sized = self._planned(x, upstream, into)
        remember(self.sized, x.mu.shape, sized)
        return sized

    def _planned(
        self, x: Operands, upstream: Outputs, into: Into | None
    ) -> tuple[Launch, GradientMemory]:
        spec = self.spec
        arrangement = planned(arrange_backward(spec, x, upstream, self.needs, into))
        inputs, of_prior = [dtype_of(t) for t in x[:3]], [dtype_of(t) for t in x[3:]]
        dtypes = (*inputs, dtype_of(upstream.z), *inputs, *of_prior, *of_prior)
        kernel = kernels.BACKWARD_TO_PRIOR if self.to_prior else kernels.BACKWARD
        sums = spec.prior == "event" and (self.needs.prior_mean or self.needs.prior_scale)
        launch = Launch(
            kernel, spec, arrangement, dtypes, compute_dtype(*x), spec.clamp, prior_sums=sums
        )
        sized = launch, GradientMemory(spec, x, self.needs, arrangement.like_mu)
        if launch.is_resizable:
            self.resizable = sized
        return sized


def backward(
    spec: Spec, x: Operands, upstream: Outputs, needs: Needs, into: Into | None
) -> Backward:
    """A plan for tensors like these."""
    if arrange_backward(spec, x, upstream, needs, into) is not None:
        if spec.log_prob is not None:
            return log_prob.backward(spec, x, upstream, needs, into)
        return _BackwardPlan(spec, needs, upstream)
    part = of_slices(spec, x)
    if part is None or upstream.kl is None:
        return backward_of_copies(spec, needs, backward)
    return backward_of_slices(part, x, upstream.kl, needs, into, backward)


def statistics(mu: Tensor, logvar: Tensor, batch_dims: int) -> Tensor:
    """The rows of ``diagnostics.statistics.ROWS``, float64 [9, D]."""
    arrangement = arrange_inputs(mu, logvar, batch_dims)
    if arrangement is None:
        (mu, logvar, *_), _ = arranged(Operands(mu, logvar), None, batch_dims)
        return statistics(mu, logvar, batch_dims)
    shape = (kernels.COLUMN_SUMS + 1, arrangement.view.event)
    out = torch.empty(shape, dtype=torch.float64, device="cpu")
    spec = Spec(*Terms()[:3], batch_dims, "logvar", None, "cpu")
    dtypes, bounds = (mu.dtype, logvar.dtype), LOGVAR_RANGE
    launch = Launch(kernels.STATISTICS, spec, arrangement, dtypes, torch.float64, bounds)
    launch(mu.data_ptr(), logvar.data_ptr(), out.data_ptr())
    return out
