"""Operators (schemas, fakes, implementations) and the autograd.Function over them.

An operator returns an empty tensor for what is not wanted: schemas have no optional results.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _eager
from ._noise import signed64
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
_MODULES = {"triton": "vaekl._launch", "eager": "vaekl._eager"}


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
    if mu.numel() == 0 and backend != "eager":
        # No elements, no kernel; plain torch knows what sums and means of nothing are.
        results = list(_eager.forward(mu, logvar, eps, generator, seed, options))
        if results[3] is not None:
            results[3] = mu.new_zeros(2, dtype=torch.int64)
    else:
        results = _module(backend).forward(mu, logvar, eps, generator, seed, options)
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
    asked = (needs[0], needs[1], needs[2])
    if mu.numel() == 0:
        results: Any = [torch.empty_like(t) if t is not None else None for t in (mu, logvar, eps)]
    else:
        results = _module(backend).backward(
            mu, logvar, eps, dz, dkl, dkl_of_mean, state, means, options, asked
        )
    return tuple(_present(r if need else None, mu) for r, need in zip(results, asked))


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


class ReparameterizeKLFunction(torch.autograd.Function):
    """(z, kl, kl_of_mean), None for what is not wanted.

    Saves mu, logvar and eps by reference, the noise state and the mean vectors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        logvar: Tensor,
        eps: Tensor | None,
        generator: torch.Generator | None,
        seed: int | None,
        options: Options,
        backend: str,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        z, kl, kl_of_mean, state, means = torch.ops.vaekl.reparameterize_kl(
            mu, logvar, eps, generator, seed, *options, backend
        )
        ctx.save_for_backward(mu, logvar, eps, state, means)
        ctx.options = options
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return wanted(z, kl, kl_of_mean, options)

    @staticmethod
    def backward(
        ctx: Any, dz: Tensor | None, dkl: Tensor | None, dkl_of_mean: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        mu, logvar, eps, state, means = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients: Sequence[Tensor | None] = (None, None, None)
        if dz is None and dkl is None and dkl_of_mean is None:
            pass
        elif torch.is_grad_enabled():
            # create_graph: the same formulas in operations that autograd can differentiate again.
            noise = _drawn_noise(mu, logvar, eps, state, ctx.options, ctx.backend)
            gradients = _eager.backward(
                mu, logvar, eps, dz, dkl, dkl_of_mean, noise, None, ctx.options, needs
            )
        else:
            results = torch.ops.vaekl.reparameterize_kl_backward(
                mu, logvar, eps, dz, dkl, dkl_of_mean, state, means,
                *ctx.options, ctx.backend, needs,
            )  # fmt: skip
            needs = (needs[0], needs[1], needs[2] and dz is not None)
            gradients = tuple(r if need else None for r, need in zip(results, needs))
        return (*gradients, None, None, None, None)


def _drawn_noise(
    mu: Tensor, logvar: Tensor, eps: Tensor | None, state: Tensor, options: Options, backend: str
) -> Tensor | None:
    """The noise that forward drew, [B, D], as a constant."""
    if eps is not None or not options.sample:
        return None
    if backend == "eager":
        return state
    batch, event = sizes(mu.shape, options.batch_dims)
    dtype = compute_dtype(mu, logvar, eps)
    return _eager.philox_normal(state[0], state[1], batch, event, dtype, mu.device)


def wanted(
    z: Tensor, kl: Tensor, kl_of_mean: Tensor, options: Options
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The operator's results without the placeholders."""
    return (
        z if options.sample else None,
        kl if options.reduction is not None else None,
        kl_of_mean if options.mean_over is not None else None,
    )


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    options: Options,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(z, kl, kl_of_mean) with gradients if any is needed; else nothing is saved."""
    if seed is not None:
        seed = signed64(seed)
    if torch.is_grad_enabled() and (
        mu.requires_grad or logvar.requires_grad or (eps is not None and eps.requires_grad)
    ):
        results: Any = ReparameterizeKLFunction.apply(  # type: ignore[no-untyped-call]
            mu, logvar, eps, generator, seed, options, backend
        )
        return results[0], results[1], results[2]
    z, kl, kl_of_mean, _, _ = torch.ops.vaekl.reparameterize_kl(
        mu, logvar, eps, generator, seed, *options, backend
    )
    return wanted(z, kl, kl_of_mean, options)
