"""The autograd.Function, and when it may pass the dispatcher by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _eager, _ops
from ._eager import Backward, Forward
from ._noise import signed64
from ._options import Options, compute_dtype, sizes

_PLAIN = (Tensor, torch.nn.Parameter)
Results = tuple[Tensor | None, Tensor | None, Tensor | None]


def _is_plain(*tensors: Tensor | None) -> bool:
    """Would the operator do nothing but call its implementation?

    Then calling that directly saves most of the host time of a small batch. Not so under
    torch.compile, dispatch modes, torch.func transforms, for subclasses and meta tensors.
    """
    if torch.compiler.is_compiling():  # first: what follows cannot be traced
        return False
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN
            or tensor.is_meta
            or tensor.is_neg()  # -x as a view of x, which the dispatcher resolves
            or tensor._is_zerotensor()
        ):
            return False
    return not (torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())


def _forward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    options: Options,
    backend: str,
) -> Forward:
    if _is_plain(mu, logvar, eps):
        return _ops.run_forward(mu, logvar, eps, generator, seed, options, backend)
    z, kl, kl_of_mean, state, means = torch.ops.vaekl.reparameterize_kl(
        mu, logvar, eps, generator, seed, *options, backend
    )
    has_kl, has_mean = options.reduction is not None, options.mean_over is not None
    return (
        z if options.sample else None,
        kl if has_kl else None,
        kl_of_mean if has_mean else None,
        state if options.sample and eps is None else None,
        means if has_mean else None,
    )


def _backward(
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
    tensors = (mu, logvar, eps, dz, dkl, dkl_of_mean, state, means)
    if _is_plain(*tensors):
        return _ops.run_backward(*tensors, options, backend, needs)
    dmu, dlogvar, deps = torch.ops.vaekl.reparameterize_kl_backward(
        *tensors, *options, backend, needs
    )
    has_deps = needs[2] and dz is not None
    return dmu if needs[0] else None, dlogvar if needs[1] else None, deps if has_deps else None


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
    ) -> Results:
        """One forward launch."""
        z, kl, kl_of_mean, state, means = _forward(
            mu, logvar, eps, generator, seed, options, backend
        )
        ctx.save_for_backward(mu, logvar, eps, state, means)
        ctx.call = (options, backend)
        ctx.set_materialize_grads(False)
        if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            ctx.mark_non_differentiable(*(t for t in (kl, kl_of_mean) if t is not None))
        return z, kl, kl_of_mean

    @staticmethod
    def backward(
        ctx: Any, dz: Tensor | None, dkl: Tensor | None, dkl_of_mean: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """One backward launch; with create_graph, formulas that can be differentiated again."""
        if dz is None and dkl is None and dkl_of_mean is None:
            return (None,) * 7
        mu, logvar, eps, state, means = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        options, backend = ctx.call
        if torch.is_grad_enabled():
            noise = _drawn_noise(mu, logvar, eps, state, options, backend)
            results = _eager.backward(
                mu, logvar, eps, dz, dkl, dkl_of_mean, noise, None, options, needs
            )
        else:
            results = _backward(
                mu, logvar, eps, dz, dkl, dkl_of_mean, state, means, options, backend, needs
            )
        return (*results, None, None, None, None)


def _drawn_noise(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    state: Tensor | None,
    options: Options,
    backend: str,
) -> Tensor | None:
    """The noise that forward drew, [B, D], as a constant."""
    if state is None or backend == "eager":
        return state
    batch, event = sizes(mu.shape, options.batch_dims)
    dtype = compute_dtype(mu, logvar, eps)
    return _eager.philox_normal(state[0], state[1], batch, event, dtype, mu.device)


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    options: Options,
    backend: str,
) -> Results:
    """(z, kl, kl_of_mean) with gradients if any is needed; else nothing is saved."""
    if seed is not None:
        seed = signed64(seed)
    needs_grad = torch.is_grad_enabled() and (
        mu.requires_grad or logvar.requires_grad or (eps is not None and eps.requires_grad)
    )
    # Under forward-mode AD the Function says that it has none; a kernel would drop the tangents.
    if needs_grad or torch.autograd.forward_ad._current_level >= 0:
        results: Results = ReparameterizeKLFunction.apply(  # type: ignore[no-untyped-call]
            mu, logvar, eps, generator, seed, options, backend
        )
        return results
    return _forward(mu, logvar, eps, generator, seed, options, backend)[:3]
