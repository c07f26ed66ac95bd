"""mu and logvar as the halves of one tensor: operators and gradients.

Forward reads two views. Backward allocates one gradient of the layout of `moments` and hands its
halves to the backend to write: strides are all that packing is, so no kernel knows of it. The
roads are those of ``_autograd``; what is composed sees two views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _autograd, _calls, _composed, _eager, _ops, _registry
from ._memory import empty_like
from ._noise import signed64
from ._options import Options

Gradients = tuple[Tensor | None, Tensor | None]


def halves(moments: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """mu and logvar, as views."""
    half = moments.shape[dim] // 2
    return moments.narrow(dim, 0, half), moments.narrow(dim, half, half)


def _run_backward(
    moments: Tensor,
    dim: int,
    tensors: Sequence[Tensor | None],
    options: Options,
    backend: str,
    needs: tuple[bool, bool],
) -> Gradients:
    """(dmoments, deps), None where not needed; one allocation each and no copy.

    `tensors`: eps, dz, dkl, dkl_of_mean, state, means.
    """
    eps, dz, dkl, dkl_of_mean, state, means = tensors
    dmoments = empty_like(moments, moments.dtype) if needs[0] else None
    _, _, deps = _calls.backward(
        *halves(moments, dim), eps, dz, dkl, dkl_of_mean, state, means, options, backend,
        (needs[0], needs[0], needs[1]), None if dmoments is None else halves(dmoments, dim),
    )  # fmt: skip
    return dmoments, deps


# Operators and fakes; `rest` is what else their schemas list, in that order.


def _forward_operator(moments: Tensor, dim: int, *rest: Any) -> tuple[Tensor, ...]:
    return _ops._forward(*halves(moments, dim), *rest)


def _forward_fake(moments: Tensor, dim: int, *rest: Any) -> tuple[Tensor, ...]:
    return _ops._forward_fake(*halves(moments, dim), *rest)


def _backward_operator(moments: Tensor, dim: int, *rest: Any) -> tuple[Tensor, ...]:
    eps, dz, dkl, dkl_of_mean, state, means, *asked, backend, needs = rest
    options = _ops.options(*asked)
    noise = state if options.sample and eps is None else None  # else forward's empty tensors
    kept = means if options.mean_over is not None else None
    tensors = (eps, dz, dkl, dkl_of_mean, noise, kept)
    results = _run_backward(moments, dim, tensors, options, backend, (needs[0], needs[1]))
    return tuple(_ops._present(result, moments) for result in results)


def _backward_fake(moments: Tensor, dim: int, *rest: Any) -> tuple[Tensor, ...]:
    eps, dz, *_, needs = rest
    wanted = (moments if needs[0] else None, eps if needs[1] and dz is not None else None)
    return tuple(moments.new_empty(0) if t is None else torch.empty_like(t) for t in wanted)


_registry.define(
    "reparameterize_kl_moments",
    "(Tensor moments, int dim, Tensor? eps, Generator? generator, SymInt? seed, "
    f"{_ops.OPTIONS}) -> (Tensor z, Tensor kl, Tensor kl_of_mean, Tensor state, Tensor means)",
    (torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
    _forward_operator,
    _forward_fake,
)
_registry.define(
    "reparameterize_kl_moments_backward",
    "(Tensor moments, int dim, Tensor? eps, Tensor? dz, Tensor? dkl, Tensor? dkl_of_mean, "
    f"Tensor? state, Tensor? means, {_ops.OPTIONS}, bool[2] needs) "
    "-> (Tensor dmoments, Tensor deps)",
    (torch.Tag.pt2_compliant_tag,),
    _backward_operator,
    _backward_fake,
)


def _gradients(
    ctx: Any,
    needs: tuple[bool, bool],
    dz: Tensor | None,
    dkl: Tensor | None,
    dkl_of_mean: Tensor | None,
) -> Gradients:
    """(dmoments, deps)."""
    if dz is None and dkl is None and dkl_of_mean is None:
        return None, None
    moments, eps, state, means = ctx.saved_tensors
    dim, options, backend = ctx.call
    tensors = (eps, dz, dkl, dkl_of_mean, state, means)
    road = _autograd.way_back(dz, dkl, dkl_of_mean, moments, eps)
    if road == "direct":
        return _run_backward(moments, dim, tensors, options, backend, needs)
    if road == "operator":
        dmoments, deps = torch.ops.vaekl.reparameterize_kl_moments_backward(
            moments, dim, *tensors, *options, backend, needs
        )
        return dmoments if needs[0] else None, deps if needs[1] and dz is not None else None
    mu, logvar = halves(moments, dim)
    noise = _autograd.drawn_noise(mu, logvar, eps, state, options, backend)
    of_mu, of_logvar, deps = _eager.backward(
        mu, logvar, eps, dz, dkl, dkl_of_mean, noise, None, options,
        (needs[0], needs[0], needs[1]),
    )  # fmt: skip
    if of_mu is None or of_logvar is None:
        return None, deps
    return torch.cat([of_mu, of_logvar], dim), deps


class ReparameterizeKLMomentsFunction(torch.autograd.Function):
    """(z, kl, kl_of_mean), None for what is not wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        moments: Tensor,
        eps: Tensor | None,
        rest: tuple[torch.Generator | None, int | None, int, Options, str],
    ) -> _autograd.Results:
        """One forward launch. `rest` as in ReparameterizeKLFunction, with dim."""
        generator, seed, dim, options, backend = rest
        results = _calls.forward(*halves(moments, dim), eps, generator, seed, options, backend)
        inputs = _autograd.kept(moments, True), _autograd.kept(eps, True)
        _autograd.save(ctx, inputs, results, (dim, options, backend), ctx.needs_input_grad[0])
        return results[:3]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """One backward launch."""
        return (*_gradients(ctx, ctx.needs_input_grad[:2], *upstream), None)


_apply = _autograd.apply_of(ReparameterizeKLMomentsFunction)


def _operator_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    moments, dim, eps, _, _, *asked, backend = inputs
    options = _ops.options(*asked)
    results = _ops.wanted(output, options, eps)
    unused = _autograd.internal(output, results)
    call = (dim, options, backend)
    inputs = _autograd.kept(moments, True), _autograd.kept(eps, True)
    _autograd.save(ctx, inputs, results, call, ctx.needs_input_grad[0], unused)


def _operator_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[2])
    dmoments, deps = _gradients(ctx, needs, *upstream[:3])
    return (dmoments, None, deps, *[None] * 8)


_registry.differentiate("reparameterize_kl_moments", _operator_backward, _operator_context)


def reparameterize_kl_moments(
    moments: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    dim: int,
    options: Options,
    backend: str,
) -> _autograd.Results:
    """(z, kl, kl_of_mean) with a gradient to moments if one is needed."""
    if seed is not None:
        seed = signed64(seed)
    is_plain = _autograd.is_plain(moments, eps)
    if not is_plain and _composed.is_needed(moments, eps):
        pair = halves(moments, dim)
        return _composed.reparameterize_kl(*pair, eps, generator, seed, options, backend)
    if not is_plain:
        _autograd.refuse_to_compile(generator)
        results = torch.ops.vaekl.reparameterize_kl_moments(
            moments, dim, eps, generator, seed, *options, backend
        )
        return _ops.wanted(results, options, eps)[:3]
    if torch.is_grad_enabled() and (
        moments.requires_grad or (eps is not None and eps.requires_grad)
    ):
        return _apply(moments, eps, (generator, seed, dim, options, backend))
    return _calls.forward(*halves(moments, dim), eps, generator, seed, options, backend)[:3]
