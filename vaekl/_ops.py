"""Operators: schemas, fakes and implementations.

An operator returns an empty tensor for what is not wanted: schemas have no optional results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _calls, _registry
from ._eager import Backward, Forward
from ._options import Options, compute_dtype, sample_dtype, sizes

OPTIONS = "str? reduction, str? mean_over, bool sample, int batch_dims, float[]? clamp, str backend"


def options(
    reduction: str | None,
    mean_over: str | None,
    sample: bool,
    batch_dims: int,
    clamp: Sequence[float] | None,
) -> Options:
    """Options from the arguments of a schema."""
    bounds = None if clamp is None else (clamp[0], clamp[1])
    return Options(reduction, mean_over, sample, batch_dims, bounds)


def _present(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def wanted(results: Sequence[Tensor], options: Options, eps: Tensor | None) -> Forward:
    """What the forward operator gave, None for what was not wanted."""
    z, kl, kl_of_mean, state, means = results
    has_kl, has_mean = options.reduction is not None, options.mean_over is not None
    return (
        z if options.sample else None,
        kl if has_kl else None,
        kl_of_mean if has_mean else None,
        state if options.sample and eps is None else None,
        means if has_mean else None,
    )


def call_forward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    options: Options,
    backend: str,
) -> Forward:
    """As ``_calls.forward``, through the operator."""
    results = torch.ops.vaekl.reparameterize_kl(mu, logvar, eps, generator, seed, *options, backend)
    return wanted(results, options, eps)


def call_backward(
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
) -> Backward:
    """As ``_calls.backward``, through the operator."""
    dmu, dlogvar, deps = torch.ops.vaekl.reparameterize_kl_backward(
        mu, logvar, eps, dz, dkl, dkl_of_mean, state, means, *options, backend, needs
    )
    has_deps = needs[2] and dz is not None
    return dmu if needs[0] else None, dlogvar if needs[1] else None, deps if has_deps else None


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
    asked = options(reduction, mean_over, sample, batch_dims, clamp)
    results = _calls.forward(mu, logvar, eps, generator, seed, asked, backend)
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
    z, kl, kl_of_mean, state, means = (mu.new_empty(0) for _ in range(5))
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
    return z, kl, kl_of_mean, state, means


def _backward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    dz: Tensor | None,
    dkl: Tensor | None,
    dkl_of_mean: Tensor | None,
    state: Tensor | None,
    means: Tensor | None,
    reduction: str | None,
    mean_over: str | None,
    sample: bool,
    batch_dims: int,
    clamp: list[float] | None,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    asked = options(reduction, mean_over, sample, batch_dims, clamp)
    if not sample or eps is not None:
        state = None  # forward's empty tensor
    if mean_over is None:
        means = None
    needed = (needs[0], needs[1], needs[2])
    results = _calls.backward(
        mu, logvar, eps, dz, dkl, dkl_of_mean, state, means, asked, backend, needed
    )
    return tuple(_present(result, mu) for result in results)


def _backward_fake(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    dz: Tensor | None,
    dkl: Tensor | None,
    dkl_of_mean: Tensor | None,
    state: Tensor | None,
    means: Tensor | None,
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


_registry.define(
    "reparameterize_kl",
    "(Tensor mu, Tensor logvar, Tensor? eps, Generator? generator, SymInt? seed, "
    f"{OPTIONS}) -> (Tensor z, Tensor kl, Tensor kl_of_mean, Tensor state, Tensor means)",
    (torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
    _forward,
    _forward_fake,
)
_registry.define(
    "reparameterize_kl_backward",
    "(Tensor mu, Tensor logvar, Tensor? eps, Tensor? dz, Tensor? dkl, Tensor? dkl_of_mean, "
    f"Tensor? state, Tensor? means, {OPTIONS}, bool[3] needs) "
    "-> (Tensor dmu, Tensor dlogvar, Tensor deps)",
    (torch.Tag.pt2_compliant_tag,),
    _backward,
    _backward_fake,
)
