"""Operators: schemas, fakes and implementations.

An operator returns an empty tensor for what is not wanted: schemas have no optional results.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from . import _eager
from ._eager import Backward, Forward
from ._options import Options, compute_dtype, sample_dtype, sizes

_LIBRARY = torch.library.Library("vaekl", "DEF")
_OPTIONS = (
    "str? reduction, str? mean_over, bool sample, int batch_dims, float[]? clamp, str backend"
)
_LIBRARY.define(
    "reparameterize_kl(Tensor mu, Tensor logvar, Tensor? eps, Generator? generator, int? seed, "
    f"{_OPTIONS}) -> (Tensor z, Tensor kl, Tensor kl_of_mean, Tensor state, Tensor means)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
_LIBRARY.define(
    "reparameterize_kl_backward(Tensor mu, Tensor logvar, Tensor? eps, Tensor? dz, Tensor? dkl, "
    f"Tensor? dkl_of_mean, Tensor state, Tensor means, {_OPTIONS}, bool[3] needs) "
    "-> (Tensor dmu, Tensor dlogvar, Tensor deps)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_MODULES = {"triton": "vaekl._launch", "cpu": "vaekl._cpu", "eager": "vaekl._eager"}


def _module(backend: str) -> ModuleType:
    """The backend's launcher, imported on first use."""
    return importlib.import_module(_MODULES[backend])


def _options(
    reduction: str | None,
    mean_over: str | None,
    sample: bool,
    batch_dims: int,
    clamp: list[float] | None,
) -> Options:
    bounds = None if clamp is None else (clamp[0], clamp[1])
    return Options(reduction, mean_over, sample, batch_dims, bounds)


def _present(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def run_forward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    options: Options,
    backend: str,
) -> Forward:
    """The backend's (z, kl, kl_of_mean, state, means), None for what is not wanted."""
    if mu.numel() == 0 and backend != "eager":
        # No elements, no kernel; plain torch knows what sums and means of nothing are.
        z, kl, kl_of_mean, state, means = _eager.forward(mu, logvar, eps, generator, seed, options)
        key = None if state is None else mu.new_zeros(2, dtype=torch.int64)
        return z, kl, kl_of_mean, key, means
    results: Forward = _module(backend).forward(mu, logvar, eps, generator, seed, options)
    return results


def run_backward(
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
    if mu.numel() == 0:
        backend = "eager"
        state = None if state is None else mu.new_empty(sizes(mu.shape, options.batch_dims))
    results: Backward = _module(backend).backward(
        mu, logvar, eps, dz, dkl, dkl_of_mean, state, means, options, needs, into
    )
    return results


def _forward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    reduction: str | None,
    mean_over: str | None,
    sample: bool,
    batch_dims: int,
    clamp: list[float] | None,
    backend: str,
) -> tuple[Tensor, ...]:
    options = _options(reduction, mean_over, sample, batch_dims, clamp)
    results = run_forward(mu, logvar, eps, generator, seed, options, backend)
    return tuple(_present(result, mu) for result in results)


def _forward_fake(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    reduction: str | None,
    mean_over: str | None,
    sample: bool,
    batch_dims: int,
    clamp: list[float] | None,
    backend: str,
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(mu, logvar, eps)
    batch, event = sizes(mu.shape, batch_dims)
    z = kl = kl_of_mean = state = means = mu.new_empty(0)
    if sample:
        z = torch.empty_like(mu, dtype=sample_dtype(mu, logvar, eps))
        if eps is None and backend == "eager":
            state = mu.new_empty((batch, event), dtype=dtype)
        elif eps is None:
            state = mu.new_empty(2, dtype=torch.int64)
    if reduction is not None:
        kl = mu.new_empty(mu.shape[:batch_dims] if reduction == "none" else (), dtype=dtype)
    if mean_over is not None:
        kl_of_mean = mu.new_empty((), dtype=dtype)
        means = mu.new_empty((2, event) if mean_over == "batch" else (2,), dtype=dtype)
    return tuple(t.clone() if t.numel() == 0 else t for t in (z, kl, kl_of_mean, state, means))


def _backward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    dz: Tensor | None,
    dkl: Tensor | None,
    dkl_of_mean: Tensor | None,
    state: Tensor,
    means: Tensor,
    reduction: str | None,
    mean_over: str | None,
    sample: bool,
    batch_dims: int,
    clamp: list[float] | None,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    options = _options(reduction, mean_over, sample, batch_dims, clamp)
    drawn = sample and eps is None
    results = run_backward(
        mu, logvar, eps, dz, dkl, dkl_of_mean,
        state if drawn else None, means if mean_over is not None else None,
        options, backend, (needs[0], needs[1], needs[2]),
    )  # fmt: skip
    return tuple(_present(result, mu) for result in results)


def _backward_fake(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    dz: Tensor | None,
    dkl: Tensor | None,
    dkl_of_mean: Tensor | None,
    state: Tensor,
    means: Tensor,
    reduction: str | None,
    mean_over: str | None,
    sample: bool,
    batch_dims: int,
    clamp: list[float] | None,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    asked = (needs[0], needs[1], needs[2] and dz is not None)
    return tuple(
        torch.empty_like(t) if need and t is not None else mu.new_empty(0)
        for t, need in zip((mu, logvar, eps), asked)
    )


for _name, _implementation, _fake in (
    ("reparameterize_kl", _forward, _forward_fake),
    ("reparameterize_kl_backward", _backward, _backward_fake),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vaekl::{_name}", _fake, lib=_LIBRARY)
