"""Each kind of call, validated and planned once.

Calls of one kind have the same Spec, and tensors of the same dtypes, devices and layouts; of the
same sizes too, unless they are contiguous and the backend's plans do not depend on sizes. What is
left for a call is to look its kind up, allocate, and launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _validate, backends
from ._spec import (
    Gradients,
    Into,
    Needs,
    Operands,
    Outputs,
    Saved,
    Source,
    Spec,
    compute_dtype,
    needed,
    sizes,
)
from .backends import layout
from .backends.protocol import Backward, Forward, remember

_forward: dict[Any, Forward] = {}
_backward: dict[Any, Backward] = {}


def forget() -> None:
    """Plan everything anew."""
    _forward.clear()
    _backward.clear()


def planned() -> list[Forward]:
    """What runs the forward calls seen so far."""
    return list(_forward.values())


@contextmanager
def use_config(config: layout.Config) -> Iterator[None]:
    """Launch with another block choice. Results agree to rounding; noise to the bit."""
    previous = layout.set_config(config)
    forget()
    try:
        yield
    finally:
        layout.set_config(previous)
        forget()


def _signature(tensor: Tensor, is_sized: bool) -> Any:
    """What a plan may depend on."""
    if not is_sized:
        if tensor.is_contiguous():
            return tensor.dtype, tensor.dim(), tensor.device
        if not any(tensor.stride()):  # a number for all, as of sum().backward()
            return tensor.dtype, tensor.dim(), tensor.device, 0
    return tensor.stride(), tensor.dtype, tensor.shape, tensor.device


def forward(spec: Spec, x: Operands, source: Source) -> tuple[Outputs, Saved]:
    """What the backend gives.

    Raises:
        TypeError, ValueError: As ``reparameterize_kl``, for its tensors and batch_dims.
        ImportError: The backend's library is not there.
    """
    mu, scale, eps, prior_mean, prior_scale = x
    samples = source.samples
    if samples is not None and not samples.is_contiguous():
        samples = samples.contiguous()
        source = source._replace(samples=samples)
    is_sized = backends.registry[spec.backend].is_sized or mu.numel() == 0
    kind: Any = (
        spec, _signature(mu, is_sized), _signature(scale, is_sized),
        None if eps is None else _signature(eps, is_sized),
    )  # fmt: skip
    if prior_mean is not None and prior_scale is not None:
        kind = (kind, _signature(prior_mean, is_sized), _signature(prior_scale, is_sized))
    plan = _forward.get(kind)
    if plan is None:
        plan = _plan_forward(spec, x)
        remember(_forward, kind, plan)
    outputs, saved = plan(x, source)
    if samples is not None and saved.key is not None:
        saved = saved._replace(samples=samples)
    return outputs, saved


def _plan_forward(spec: Spec, x: Operands) -> Forward:
    _validate.parameters(x, spec.batch_dims, spec.prior)
    if x.mu.numel() == 0 and spec.backend != backends.FALLBACK:
        return _plan_nothing(spec, x)
    return backends.get(spec.backend).forward(spec, x)


def _plan_nothing(spec: Spec, x: Operands) -> Forward:
    """No elements, no kernel; plain torch knows what sums and means of nothing are."""
    plan = backends.get(backends.FALLBACK).forward(spec, x)

    def run(x: Operands, source: Source) -> tuple[Outputs, Saved]:
        outputs, saved = plan(x, source)
        key = None if saved.noise is None else x.mu.new_zeros(2, dtype=torch.int64)
        return outputs, Saved(key, saved.means)

    return run


def backward(
    spec: Spec,
    x: Operands,
    saved: Saved,
    upstream: Outputs,
    needs: Needs,
    into: Into | None = None,
) -> Gradients:
    """The backend's gradients, None where not needed.

    ``into`` has the shape and dtype of mu; both gradients are needed then.
    """
    mu, scale, eps, prior_mean, prior_scale = x
    dz, dkl, dkl_of_mean = upstream
    is_sized = backends.registry[spec.backend].is_sized or mu.numel() == 0
    of_mean: Any = None
    if dkl_of_mean is not None:  # a number, but of log p one for each sample
        of_mean = dkl_of_mean.dtype if spec.log_prob is None else _signature(dkl_of_mean, is_sized)
    kind: Any = (
        spec,
        needs,
        _signature(mu, is_sized),
        _signature(scale, is_sized),
        None if eps is None else _signature(eps, is_sized),
        None if dz is None else _signature(dz, is_sized),
        None if dkl is None else _signature(dkl, is_sized),
        of_mean,
        None if into is None else (into.mu.stride(), into.scale.stride()),
    )
    if prior_mean is not None and prior_scale is not None:
        kind = (kind, _signature(prior_mean, is_sized), _signature(prior_scale, is_sized))
    plan = _backward.get(kind)
    if plan is None:
        plan = _plan_backward(spec, x, upstream, needs, into)
        remember(_backward, kind, plan)
    key, means, _, samples = saved
    if (
        (key is not None and not key.is_contiguous())
        or (means is not None and not means.is_contiguous())
        or (samples is not None and not samples.is_contiguous())
    ):  # by torch's saved-tensor hooks they may have become anything
        saved = Saved(*(None if t is None else t.contiguous() for t in saved))
    return plan(x, saved, upstream, into)


def _plan_backward(
    spec: Spec, x: Operands, upstream: Outputs, needs: Needs, into: Into | None
) -> Backward:
    needs = needed(spec, needs, upstream)
    backend = spec.backend
    if x.mu.numel() == 0 and backend != backends.FALLBACK:
        return _plan_back_from_nothing(spec, x, upstream, needs, into)
    if backend != backends.FALLBACK:  # which converts them
        _check_dtypes(compute_dtype(*x), upstream)
    return backends.get(backend).backward(spec, x, upstream, needs, into)


def _plan_back_from_nothing(
    spec: Spec, x: Operands, upstream: Outputs, needs: Needs, into: Into | None
) -> Backward:
    plan = backends.get(backends.FALLBACK).backward(spec, x, upstream, needs, into)

    def run(x: Operands, saved: Saved, upstream: Outputs, into: Into | None) -> Gradients:
        noise = None
        if saved.key is not None:
            noise = x.mu.new_empty(sizes(x.mu.shape, spec.batch_dims))
        return plan(x, Saved(None, saved.means, noise), upstream, into)

    return run


def _check_dtypes(dtype: torch.dtype, upstream: Outputs) -> None:
    """Gradients of the KLs have the dtype that forward computed in; so must what it saved give."""
    for gradient in (upstream.kl, upstream.kl_of_mean):
        if gradient is not None and gradient.dtype != dtype:
            raise TypeError(
                f"gradients of KLs and log densities must be {dtype} with inputs as they are in "
                f"backward, got {gradient.dtype}; saved-tensor hooks must give back the dtypes "
                "that they got"
            )
