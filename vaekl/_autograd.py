"""Which of three roads a call takes, and the gradients along the first two.

- Plain tensors and nothing else going on: an autograd.Function, straight to the backend.
- torch.compile, modes, captures, fake and meta tensors: the operator, itself differentiable.
- torch.func, forward-mode AD, torch.export, subclasses: composed of plain torch operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _dispatch_keys,
    _dispatch_tls_local_include_set,
    _len_torch_function_stack,
)
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.overrides import _get_current_function_mode_stack

from . import _calls, _composed, _eager, _ops, _registry
from ._eager import Backward
from ._noise import philox_normal, signed64
from ._options import Options, compute_dtype, sizes

_PLAIN = (Tensor, torch.nn.Parameter)
#: What the dispatcher adds to every tensor's keys on a thread where nothing is going on. Dispatch
#: modes, transforms, tracers and captures of every kind add a key of their own.
_ORDINARY = DispatchKeySet(DispatchKey.BackendSelect) | DispatchKeySet(DispatchKey.ADInplaceOrView)
_MODES = ~_ORDINARY.raw_repr()
_plain_keys: set[int] = set()
Results = tuple[Tensor | None, Tensor | None, Tensor | None]


def is_plain(*tensors: Tensor | None) -> bool:
    """Would the operator do nothing but call its implementation? (Of what is no tensor: no.)

    Then calling that directly saves most of the host time of a small batch.
    """
    if (
        is_compiling()  # first: Dynamo cannot trace all of what follows
        or _dispatch_tls_local_include_set().raw_repr() & _MODES
        or (_len_torch_function_stack() and _has_function_mode())
        or forward_ad._current_level >= 0
    ):
        return False
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN
            or (
                _dispatch_keys(tensor).raw_repr() not in _plain_keys and not _has_plain_keys(tensor)
            )
        ):
            return False
    return True


def _has_function_mode() -> bool:
    """One that wants to see what is called, not torch.set_default_device's."""
    from torch.utils._device import DeviceContext  # loaded where there is one

    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def _has_plain_keys(tensor: Tensor) -> bool:
    """Nothing in the dispatcher's keys but a device, autograd and autocast; kept for next time."""
    is_plain = not (
        tensor.layout is not torch.strided
        or tensor.is_nested
        or tensor.is_meta
        or tensor.is_neg()  # -x as a view of x, which the dispatcher resolves
        or tensor._is_zerotensor()
        or torch._is_functional_tensor(tensor)
        or is_functorch_wrapped_tensor(tensor)  # and left over from a transform that has ended
        or is_legacy_batchedtensor(tensor)  # of is_grads_batched, which shows in nothing else
    )
    if is_plain:
        _plain_keys.add(_dispatch_keys(tensor).raw_repr())
    return is_plain


def kept(tensor: Tensor | None, is_read: bool) -> Tensor | None:
    """What to save of an input: of one that no needed gradient reads, all but its values."""
    if tensor is None or (is_read and not tensor.is_inference()):
        return tensor
    # Autograd keeps no tensor that was made in inference mode; plain code keeps results of it.
    return tensor.clone() if is_read else tensor.new_empty(()).expand(tensor.shape)


def _kept(ctx: Any, mu: Tensor, logvar: Tensor, eps: Tensor | None) -> list[Tensor | None]:
    of_mu, of_logvar, of_eps = ctx.needs_input_grad[:3]
    if of_mu and of_logvar and eps is None:
        return [mu, logvar, None]
    return [kept(mu, of_mu), kept(logvar, of_logvar or of_eps), kept(eps, of_logvar or of_eps)]


def save(
    ctx: Any,
    inputs: Sequence[Tensor | None],
    results: tuple[Tensor | None, ...],
    call: tuple[Any, ...],
    has_gradient: bool,
    constants: Sequence[Tensor] = (),
) -> None:
    """For backward: inputs by reference, the noise state, the mean vectors, and `call`.

    `has_gradient`: whether the KLs do. `constants`: outputs that have none, whatever the inputs.
    """
    _, kl, kl_of_mean, state, means = results
    ctx.save_for_backward(*inputs, state, means)
    ctx.call = call
    ctx.set_materialize_grads(False)
    if not has_gradient:
        constants = [*constants, *(t for t in (kl, kl_of_mean) if t is not None)]
    if constants:
        ctx.mark_non_differentiable(*constants)


def way_back(
    dz: Tensor | None, dkl: Tensor | None, dkl_of_mean: Tensor | None, *inputs: Tensor | None
) -> str:
    """The road that gradients take: "direct", "operator" or "composed"."""
    if torch.is_grad_enabled():  # create_graph: formulas that torch can see into
        return "composed"
    if is_plain(dz, dkl, dkl_of_mean, *inputs):
        return "direct"
    return "composed" if _composed.is_needed(dz, dkl, dkl_of_mean, *inputs) else "operator"


def _gradients(
    ctx: Any, dz: Tensor | None, dkl: Tensor | None, dkl_of_mean: Tensor | None
) -> Backward:
    """(dmu, dlogvar, deps)."""
    if dz is None and dkl is None and dkl_of_mean is None:
        return None, None, None
    mu, logvar, eps, state, means = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    options, backend = ctx.call
    tensors = (mu, logvar, eps, dz, dkl, dkl_of_mean)
    road = way_back(dz, dkl, dkl_of_mean, mu, logvar, eps)
    if road == "direct":
        return _calls.backward(*tensors, state, means, options, backend, needs)
    if road == "operator":
        return _ops.call_backward(*tensors, state, means, options, backend, needs)
    noise = drawn_noise(mu, logvar, eps, state, options, backend)
    return _eager.backward(*tensors, noise, None, options, needs)


def drawn_noise(
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
    return philox_normal(state[0], state[1], batch, event, dtype, mu.device)


class ReparameterizeKLFunction(torch.autograd.Function):
    """(z, kl, kl_of_mean), None for what is not wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        mu: Tensor,
        logvar: Tensor,
        eps: Tensor | None,
        rest: tuple[_calls.Call, torch.Generator | None, int | None],
    ) -> Results:
        """One forward launch. `rest`, as one argument, costs autograd less than three."""
        call, generator, seed = rest
        results = call.run(mu, logvar, eps, generator, seed)
        has_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        inputs = _kept(ctx, mu, logvar, eps)
        save(ctx, inputs, results, (call.options, call.backend), has_gradient)
        return results[:3]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """One backward launch."""
        return (*_gradients(ctx, *upstream), None)


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Results]:
    """Its apply without the Python code around it for transforms: under them no tensor is plain."""
    apply: Callable[..., Results] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


_apply = apply_of(ReparameterizeKLFunction)


def _operator_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    mu, logvar, eps, _, _, *options, backend = inputs
    asked = _ops.options(*options)
    results = _ops.wanted(output, asked, eps)
    has_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
    unused = internal(output, results)
    save(ctx, _kept(ctx, mu, logvar, eps), results, (asked, backend), has_gradient, unused)


def internal(output: Sequence[Tensor], results: Sequence[Tensor | None]) -> list[Tensor]:
    """An operator's outputs that are for nobody: empty tensors, the noise state and the means."""
    return [t for t, result in zip(output, (*results[:3], None, None)) if result is None]


def _operator_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, *upstream[:3]), *[None] * 8)


_registry.differentiate("reparameterize_kl", _operator_backward, _operator_context)


def refuse_to_compile(generator: torch.Generator | None) -> None:
    """No program can hold a generator."""
    if generator is not None and torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg="generator= cannot be compiled: leave it out, or use seed=")


def direct(
    call: _calls.Call,
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
) -> Results:
    """(z, kl, kl_of_mean) of plain tensors, with gradients if any is needed."""
    if seed is not None:
        seed = signed64(seed)
    if torch.is_grad_enabled() and (
        mu.requires_grad or logvar.requires_grad or (eps is not None and eps.requires_grad)
    ):
        return _apply(mu, logvar, eps, (call, generator, seed))
    return call.run(mu, logvar, eps, generator, seed)[:3]


def indirect(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    options: Options,
    backend: str,
) -> Results:
    """(z, kl, kl_of_mean) by the operator, or composed where that would be lost."""
    if seed is not None:
        seed = signed64(seed)
    if _composed.is_needed(mu, logvar, eps):
        return _composed.reparameterize_kl(mu, logvar, eps, generator, seed, options, backend)
    refuse_to_compile(generator)
    return _ops.call_forward(mu, logvar, eps, generator, seed, options, backend)[:3]
