"""mu and logvar as the halves of one tensor: its autograd.Function and its backward operator.

Forward hands two views to the operator of ``_ops``. Backward allocates one gradient of the layout
of `moments` and hands its halves to the backend to write: strides are all that packing is, so no
kernel knows of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _autograd, _eager, _ops
from ._noise import signed64
from ._options import Options

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
    eps: Tensor | None,
    dz: Tensor | None,
    dkl: Tensor | None,
    dkl_of_mean: Tensor | None,
    state: Tensor | None,
    means: Tensor | None,
    options: Options,
    backend: str,
    needs: tuple[bool, bool],
) -> Gradients:
    """(dmoments, deps), None where not needed; one allocation each and no copy."""
    dmoments = torch.empty_like(moments) if needs[0] else None
    _, _, deps = _ops.run_backward(
        *halves(moments, dim), eps, dz, dkl, dkl_of_mean, state, means, options, backend,
        (needs[0], needs[0], needs[1]), None if dmoments is None else halves(dmoments, dim),
    )  # fmt: skip
    return dmoments, deps


def _operator(
    moments: Tensor,
    dim: int,
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
    options = _ops._options(reduction, mean_over, sample, batch_dims, clamp)
    results = _run_backward(
        moments, dim, eps, dz, dkl, dkl_of_mean,
        state if sample and eps is None else None, means if mean_over is not None else None,
        options, backend, (needs[0], needs[1]),
    )  # fmt: skip
    return tuple(_ops._present(result, moments) for result in results)


def _fake(
    moments: Tensor, dim: int, eps: Tensor | None, dz: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    needs = others[-1]
    wanted = (moments if needs[0] else None, eps if needs[1] and dz is not None else None)
    return tuple(moments.new_empty(0) if t is None else torch.empty_like(t) for t in wanted)


_NAME = "reparameterize_kl_moments_backward"
_ops._LIBRARY.impl(_NAME, _operator, "CompositeExplicitAutograd")
torch.library.register_fake(f"vaekl::{_NAME}", _fake, lib=_ops._LIBRARY)


def _backward(
    moments: Tensor,
    dim: int,
    tensors: tuple[Tensor | None, ...],
    options: Options,
    backend: str,
    needs: tuple[bool, bool],
) -> Gradients:
    """Past the dispatcher where it would do nothing; `tensors`: eps, dz, dkl, dkl_of_mean, state,
    means."""
    eps, dz, dkl, dkl_of_mean, state, means = tensors
    if _autograd._is_plain(moments, *tensors):
        return _run_backward(
            moments, dim, eps, dz, dkl, dkl_of_mean, state, means, options, backend, needs
        )
    dmoments, deps = torch.ops.vaekl.reparameterize_kl_moments_backward(
        moments, dim, *tensors, *options, backend, needs
    )
    has_deps = needs[1] and dz is not None
    return dmoments if needs[0] else None, deps if has_deps else None


class ReparameterizeKLMomentsFunction(torch.autograd.Function):
    """(z, kl, kl_of_mean), None for what is not wanted.

    Saves moments and eps by reference, the noise state and the mean vectors.
    """

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
        z, kl, kl_of_mean, state, means = _autograd._forward(
            *halves(moments, dim), eps, generator, seed, options, backend
        )
        ctx.save_for_backward(moments, eps, state, means)
        ctx.call = (dim, options, backend)
        ctx.set_materialize_grads(False)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(*(t for t in (kl, kl_of_mean) if t is not None))
        return z, kl, kl_of_mean

    @staticmethod
    def backward(
        ctx: Any, dz: Tensor | None, dkl: Tensor | None, dkl_of_mean: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """One backward launch; with create_graph, formulas that can be differentiated again."""
        if dz is None and dkl is None and dkl_of_mean is None:
            return (None,) * 7
        moments, eps, state, means = ctx.saved_tensors
        dim, options, backend = ctx.call
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        dmoments: Tensor | None
        if torch.is_grad_enabled():
            mu, logvar = halves(moments, dim)
            noise = _autograd._drawn_noise(mu, logvar, eps, state, options, backend)
            dmu, dlogvar, deps = _eager.backward(
                mu, logvar, eps, dz, dkl, dkl_of_mean, noise, None, options,
                (needs[0], needs[0], needs[1]),
            )  # fmt: skip
            dmoments = None
            if dmu is not None and dlogvar is not None:
                dmoments = torch.cat([dmu, dlogvar], dim)
        else:
            tensors = (eps, dz, dkl, dkl_of_mean, state, means)
            dmoments, deps = _backward(moments, dim, tensors, options, backend, needs)
        return (dmoments, deps, *(None,) * 5)


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
    needs_grad = torch.is_grad_enabled() and (
        moments.requires_grad or (eps is not None and eps.requires_grad)
    )
    # A torch.func transform, forward-mode AD or a call that saves nothing: what two views get.
    if (
        not needs_grad
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return _autograd.reparameterize_kl(
            *halves(moments, dim), eps, generator, seed, options, backend
        )
    if seed is not None:
        seed = signed64(seed)
    results: _autograd.Results = ReparameterizeKLMomentsFunction.apply(  # type: ignore[no-untyped-call]
        moments, eps, generator, seed, dim, options, backend
    )
    return results
