"""Launches of ``vaekl.kernels.cpu.log_prob`` and its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vaekl._noise import draw_key
from vaekl._spec import (
    Gradients,
    Into,
    Needs,
    Operands,
    Outputs,
    Saved,
    Source,
    Spec,
    compute_dtype,
    kl_shape,
    sample_dtype,
)
from vaekl.kernels import cpu as kernels

from .launch import Launch, addresses, dtype_of, planned
from .memory import allocator
from .protocol import Backward, Forward, remember
from .strided import (
    GradientMemory,
    Strides,
    arrange_backward,
    arrange_forward,
    dense,
)

_Sized = tuple[Launch, Callable[[Tensor], Tensor], tuple[Strides, Strides]]


def forward(spec: Spec, like: Operands) -> Forward:
    """A plan for tensors like these, of all sizes."""
    dtype, z_dtype = compute_dtype(*like), sample_dtype(*like[:3])
    sized: dict[torch.Size, _Sized] = {}

    def of_size(x: Operands) -> _Sized:
        inputs, of_prior = [dtype_of(t) for t in x[:3]], [dtype_of(t) for t in x[3:]]
        arrangement, dtypes = planned(arrange_forward(spec, x)), (*inputs, z_dtype, *of_prior)
        launch = Launch(kernels.LOG_PROB, spec, arrangement, dtypes, dtype, spec.clamp)
        found = launch, allocator(x.mu, z_dtype), dense(kl_shape(spec, x.mu.shape))
        remember(sized, x.mu.shape, found)
        return found

    def run(x: Operands, source: Source) -> tuple[Outputs, Saved]:
        mu, scale, eps, *prior = x
        launch, new_z, densities = sized.get(mu.shape) or of_size(x)
        z, key, seed, offset = new_z(mu), None, 0, 0
        if eps is None:
            seed, offset, _ = draw_key(mu.device, source)
            key = torch.empty(2, dtype=torch.int64, device="cpu")
        log_q, log_p = (torch.empty_strided(*densities, dtype=dtype, device="cpu") for _ in "qp")
        tensors = addresses(mu, scale, eps, z, log_q, log_p, key)
        launch(*tensors, seed, offset, *addresses(source.samples, *prior))
        return Outputs(z, log_q, log_p), Saved(key)

    return run


def backward(
    spec: Spec, like: Operands, upstream: Outputs, needs: Needs, into: Into | None
) -> Backward:
    """A plan for tensors like these, of all sizes."""
    sums = spec.prior == "event" and (needs.prior_mean or needs.prior_scale)
    sized: dict[torch.Size, tuple[Launch, GradientMemory]] = {}

    def of_size(x: Operands, upstream: Outputs) -> tuple[Launch, GradientMemory]:
        arrangement = planned(arrange_backward(spec, x, upstream, needs, into))
        inputs, of_prior = [dtype_of(t) for t in x[:3]], [dtype_of(t) for t in x[3:]]
        dtypes = (*inputs, dtype_of(upstream.z), *inputs, *of_prior, *of_prior)
        dtype, kernel = compute_dtype(*x), kernels.LOG_PROB_BACKWARD
        launch = Launch(kernel, spec, arrangement, dtypes, dtype, spec.clamp, prior_sums=sums)
        found = launch, GradientMemory(spec, x, needs, arrangement.like_mu)
        remember(sized, x.mu.shape, found)
        return found

    def run(x: Operands, saved: Saved, upstream: Outputs, into: Into | None) -> Gradients:
        launch, new_gradients = sized.get(x.mu.shape) or of_size(x, upstream)
        gradients = new_gradients(x, into)
        (mu, scale, eps, *prior), (d_mu, d_scale, d_eps, *d_prior) = x, gradients
        launch(
            *addresses(mu, scale, eps, *upstream, saved.key, saved.samples),
            *addresses(d_mu, d_scale, d_eps, *prior, *d_prior),
        )
        return gradients

    return run
