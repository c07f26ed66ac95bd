"""mu and logvar as the halves of one tensor: operators and gradients.

Forward reads two views. Backward allocates one gradient of the layout of `moments` and hands its
halves to the backend to write: strides are all that packing is, so no kernel knows of it. The
roads are those of ``_autograd``: plain tensors go straight to the backend, torch.compile and
dispatch modes see the operators, torch.func and forward-mode AD see two views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _autograd, _eager, _ops
from ._eager import Forward
from ._noise import signed64
from ._options import Options

_ops._LIBRARY.define(
    "reparameterize_kl_moments(Tensor moments, int dim, Tensor? eps, Generator? generator, "
    f"int? seed, {_ops._OPTIONS}) "
    "-> (Tensor z, Tensor kl, Tensor kl_of_mean, Tensor state, Tensor means)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
_ops._LIBRARY.define(
    "reparameterize_kl_moments_backward(Tensor moments, int dim, Tensor? eps, Tensor? dz, "
    f"Tensor? dkl, Tensor? dkl_of_mean, Tensor state, Tensor means, {_ops._OPTIONS}, bool[2] needs)"
    " -> (Tensor dmoments, Tensor deps)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
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
    dmoments = torch.empty_like(moments) if needs[0] else None
    _, _, deps = _ops.run_backward(
        *halves(moments, dim), eps, dz, dkl, dkl_of_mean, state, means, options, backend,
        (needs[0], needs[0], needs[1]), None if dmoments is None else halves(dmoments, dim),
    )  # fmt: skip
    return dmoments, deps


def _forward_operator(
    moments: Tensor,
    dim: int,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return _ops._forward(*halves(moments, dim), eps, generator, seed, *rest)


def _forward_fake(
    moments: Tensor,
    dim: int,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return _ops._forward_fake(*halves(moments, dim), eps, generator, seed, *rest)


def _backward_operator(
    moments: Tensor,
    dim: int,
    eps: Tensor | None,
    dz: Tensor | None,
    dkl: Tensor | None,
    dkl_of_mean: Tensor | None,
    state: Tensor,
    means: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *asked, backend, needs = rest
    options = _ops._options(*asked)
    noise = state if options.sample and eps is None else None  # else forward's empty tensors
    kept = means if options.mean_over is not None else None
    tensors = (eps, dz, dkl, dkl_of_mean, noise, kept)
    results = _run_backward(moments, dim, tensors, options, backend, (needs[0], needs[1]))
    return tuple(_ops._present(result, moments) for result in results)


def _backward_fake(
    moments: Tensor, dim: int, eps: Tensor | None, dz: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    needs = rest[-1]
    wanted = (moments if needs[0] else None, eps if needs[1] and dz is not None else None)
    return tuple(moments.new_empty(0) if t is None else torch.empty_like(t) for t in wanted)


for _name, _implementation, _fake in (
    ("reparameterize_kl_moments", _forward_operator, _forward_fake),
    ("reparameterize_kl_moments_backward", _backward_operator, _backward_fake),
):
    _ops._LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vaekl::{_name}", _fake, lib=_ops._LIBRARY)


def _wanted(results: Sequence[Tensor], options: Options, eps: Tensor | None) -> Forward:
    """What the forward operator gave, None for what was not wanted."""
    z, kl, kl_of_mean, state, means = results
    return (
        z if options.sample else None,
        kl if options.reduction is not None else None,
        kl_of_mean if options.mean_over is not None else None,
        state if options.sample and eps is None else None,
        means if options.mean_over is not None else None,
    )


def _save(
    ctx: Any,
    inputs: tuple[Tensor, int, Tensor | None],
    results: Forward,
    options: Options,
    backend: str,
    constants: Sequence[Tensor] = (),
) -> None:
    """For backward: moments and eps by reference, the noise state and the mean vectors.

    `constants`: outputs that have no gradient, whatever the inputs.
    """
    moments, dim, eps = inputs
    _, kl, kl_of_mean, state, means = results
    ctx.save_for_backward(moments, eps, state, means)
    ctx.call = (dim, options, backend)
    ctx.set_materialize_grads(False)
    if not ctx.needs_input_grad[0]:
        constants = [*constants, *(t for t in (kl, kl_of_mean) if t is not None)]
    if constants:
        ctx.mark_non_differentiable(*constants)


def _gradients(
    ctx: Any,
    needs: tuple[bool, bool],
    dz: Tensor | None,
    dkl: Tensor | None,
    dkl_of_mean: Tensor | None,
) -> Gradients:
    """One launch; with create_graph, formulas that can be differentiated again."""
    if dz is None and dkl is None and dkl_of_mean is None:
        return None, None
    moments, eps, state, means = ctx.saved_tensors
    dim, options, backend = ctx.call
    tensors = (eps, dz, dkl, dkl_of_mean, state, means)
    if torch.is_grad_enabled():
        mu, logvar = halves(moments, dim)
        noise = _autograd._drawn_noise(mu, logvar, eps, state, options, backend)
        of_mu, of_logvar, deps = _eager.backward(
            mu, logvar, eps, dz, dkl, dkl_of_mean, noise, None, options,
            (needs[0], needs[0], needs[1]),
        )  # fmt: skip
        if of_mu is None or of_logvar is None:
            return None, deps
        return torch.cat([of_mu, of_logvar], dim), deps
    if _autograd._is_plain(moments, *tensors):
        return _run_backward(moments, dim, tensors, options, backend, needs)
    empty = moments.new_empty(0)
    dmoments, deps = torch.ops.vaekl.reparameterize_kl_moments_backward(
        moments, dim, *tensors[:4], *(empty if t is None else t for t in (state, means)),
        *options, backend, needs,
    )  # fmt: skip
    return dmoments if needs[0] else None, deps if needs[1] and dz is not None else None


class ReparameterizeKLMomentsFunction(torch.autograd.Function):
    """(z, kl, kl_of_mean), None for what is not wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        moments: Tensor,
        eps: Tensor | None,
        generator: torch.Generator | None,
        seed: int | None,
        dim: int,
        options: Options,
        backend: str,
    ) -> _autograd.Results:
        """One forward launch."""
        results = _ops.run_forward(*halves(moments, dim), eps, generator, seed, options, backend)
        _save(ctx, (moments, dim, eps), results, options, backend)
        return results[:3]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """One backward launch."""
        return (*_gradients(ctx, ctx.needs_input_grad[:2], *upstream), *[None] * 5)


def _operator_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    moments, dim, eps, _, _, *asked, backend = inputs
    options = _ops._options(*asked)
    results = _wanted(output, options, eps)
    # The empty tensors, the noise state and the means are for nobody else.
    constants = [t for t, result in zip(output, (*results[:3], None, None)) if result is None]
    _save(ctx, (moments, dim, eps), results, options, backend, constants)


def _operator_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[2])
    dmoments, deps = _gradients(ctx, needs, *upstream[:3])
    return (dmoments, None, deps, *[None] * 8)


torch.library.register_autograd(
    "vaekl::reparameterize_kl_moments",
    _operator_backward,
    setup_context=_operator_context,
    lib=_ops._LIBRARY,
)


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
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        pair = halves(moments, dim)
        return _autograd.reparameterize_kl(*pair, eps, generator, seed, options, backend)
    if seed is not None:
        seed = signed64(seed)
    if not _autograd._is_plain(moments, eps):
        results = torch.ops.vaekl.reparameterize_kl_moments(
            moments, dim, eps, generator, seed, *options, backend
        )
        return _wanted(results, options, eps)[:3]
    if torch.is_grad_enabled() and (
        moments.requires_grad or (eps is not None and eps.requires_grad)
    ):
        outputs: _autograd.Results = ReparameterizeKLMomentsFunction.apply(  # type: ignore[no-untyped-call]
            moments, eps, generator, seed, dim, options, backend
        )
        return outputs
    return _ops.run_forward(*halves(moments, dim), eps, generator, seed, options, backend)[:3]
