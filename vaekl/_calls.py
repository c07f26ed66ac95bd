"""Calls of one kind: the same dtypes, devices, sizes and strides of tensors, and the same options.

All that these settle is worked out once a kind: whether the tensors fit each other, and what the
backend plans. What is left for a call is to look its kind up, allocate, and launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backends, _eager, _layout, _validate
from ._eager import Backward, Forward
from ._options import Options, compute_dtype, sizes

#: Of (mu, logvar, eps, generator, seed).
Run = Callable[..., Forward]
#: Of (mu, logvar, eps, dz, dkl, dkl_of_mean, state, means, *, into).
RunBackward = Callable[..., Backward]

_loaded: dict[str, ModuleType] = {}
#: Where shapes keep changing most do not come again, and a kind takes some 10 KB.
_MOST = 256


class Call(NamedTuple):
    """A kind of forward calls."""

    run: Run
    options: Options
    backend: str


_forward: dict[Any, Call] = {}
_backward: dict[Any, RunBackward] = {}


def forget() -> None:
    """Plan everything anew."""
    _forward.clear()
    _backward.clear()


def planned() -> list[Run]:
    """What runs the forward calls seen so far."""
    return [call.run for call in _forward.values()]


@contextmanager
def use_config(config: _layout.Config) -> Iterator[None]:
    """Launch with another block choice. Results agree to rounding; noise to the bit."""
    previous = _layout.set_config(config)
    forget()
    try:
        yield
    finally:
        _layout.set_config(previous)
        forget()


def _module(backend: str) -> ModuleType:
    """The backend's launcher, imported on first use.

    Raises:
        ModuleNotFoundError: What it needs does not work. A compiled program may come from a machine
            where it does.
    """
    module = _loaded.get(backend)
    if module is None:
        _backends.require(backend)
        module = _loaded[backend] = _import(backend)
    return module


def _import(backend: str) -> ModuleType:
    """By statements: what freezes an application packs the modules that it sees in these."""
    if backend == "triton":
        from . import _launch

        return _launch
    if backend == "cpu":
        from . import _cpu

        return _cpu
    return _eager


def _signature(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.stride(), tensor.dtype, tensor.shape, tensor.device)


def _remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    for oldest in list(known)[: max(len(known) + 1 - _MOST, 0)]:
        known.pop(oldest, None)  # another thread may have been faster
    known[key] = value


def find(mu: Tensor, logvar: Tensor, eps: Tensor | None, options: Options, backend: str) -> Call:
    """The kind of a call.

    Raises:
        TypeError, ValueError: As ``reparameterize_kl``, for its tensors and batch_dims.
        ImportError: The backend's library is not there.
    """
    key = (_signature(mu), _signature(logvar), _signature(eps), options, backend)
    call = _forward.get(key)
    if call is None:
        _validate.parameters(mu, logvar, options.batch_dims)
        _validate.noise(mu, eps, None, None)
        if mu.numel() == 0 and backend != "eager":
            run = _plan_nothing(options)
        else:
            run = _module(backend).plan_forward(mu, logvar, eps, options)
        call = Call(run, options, backend)
        _remember(_forward, key, call)
    return call


def _plan_nothing(options: Options) -> Run:
    """No elements, no kernel; plain torch knows what sums and means of nothing are."""

    def run(
        mu: Tensor,
        logvar: Tensor,
        eps: Tensor | None,
        generator: torch.Generator | None,
        seed: int | None,
    ) -> Forward:
        z, kl, kl_of_mean, state, means = _eager.forward(mu, logvar, eps, generator, seed, options)
        key = None if state is None else mu.new_zeros(2, dtype=torch.int64)
        return z, kl, kl_of_mean, key, means

    return run


def forward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    options: Options,
    backend: str,
) -> Forward:
    """The backend's (z, kl, kl_of_mean, state, means), None for what is not wanted."""
    return find(mu, logvar, eps, options, backend).run(mu, logvar, eps, generator, seed)


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
    backend: str,
    needs: tuple[bool, bool, bool],
    into: tuple[Tensor, Tensor] | None = None,
) -> Backward:
    """The backend's (dmu, dlogvar, deps), None where not needed; `into`: write the first two there.

    ``into`` has the shape and dtype of mu; both gradients are needed then.
    """
    of_mean = None if dkl_of_mean is None else dkl_of_mean.dtype
    upstream = (_signature(dz), _signature(dkl), of_mean)
    given = None if into is None else (into[0].stride(), into[1].stride())
    inputs = (_signature(mu), _signature(logvar), _signature(eps))
    key = (inputs, upstream, options, backend, needs, given)
    run = _backward.get(key)
    if run is None:
        if mu.numel() == 0:
            backend = "eager"
        if backend != "eager":  # which converts them
            _check_dtypes(compute_dtype(mu, logvar, eps), dkl, dkl_of_mean)
        asked = (needs[0], needs[1], needs[2] and dz is not None)
        run = _module(backend).plan_backward(mu, logvar, eps, dz, dkl, options, asked, into)
        _remember(_backward, key, run)
    if state is not None:
        state = state.contiguous()  # by torch's saved-tensor hooks it may have become anything
        if mu.numel() == 0:
            state = mu.new_empty(sizes(mu.shape, options.batch_dims))
    if means is not None:
        means = means.contiguous()
    return run(mu, logvar, eps, dz, dkl, dkl_of_mean, state, means, into=into)


def _check_dtypes(dtype: torch.dtype, *of_kls: Tensor | None) -> None:
    """Gradients of the KLs have the dtype that forward computed in; so must what it saved give."""
    for gradient in of_kls:
        if gradient is not None and gradient.dtype != dtype:
            raise TypeError(
                f"gradients of the KLs must be {dtype} with inputs as they are in backward, got "
                f"{gradient.dtype}; saved-tensor hooks must give back the dtypes that they got"
            )
