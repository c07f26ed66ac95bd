"""A call on its road, and the gradients of all three roads."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import _operators, _plans, _registry, _roads
from ._noise import philox_normal
from ._operators import OfStorage, Storage, named, operands, stored
from ._spec import (
    Key,
    Needs,
    Operands,
    Outputs,
    Saved,
    Source,
    Spec,
    compute_dtype,
    from_text,
    sizes,
)
from .backends import composed, densities, formulas

#: z, kl, kl_of_mean; None for what is not wanted.
Results = tuple[Tensor | None, Tensor | None, Tensor | None]


def run(road: _roads.Road, spec: Spec, storage: Storage, source: Source) -> Results:
    """The outputs, with gradients to the storage if any is needed. (Operands are a storage.)"""
    if road == "direct":
        if torch.is_grad_enabled():
            for tensor in storage:
                if tensor is not None and tensor.requires_grad:
                    return _apply((spec, source, storage), *storage)
        return _plans.forward(spec, operands(spec, storage), source)[0]
    if road == "composed":
        return composed.forward(spec, operands(spec, storage), source)
    _refuse_to_compile(source.generator)
    return _operators.call_forward(spec, storage, source)[0]


def _refuse_to_compile(generator: torch.Generator | None) -> None:
    """No program can hold a generator."""
    if generator is not None and torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg="generator= cannot be compiled: leave it out, or use seed=")


_needs = lru_cache(Needs)  # there are few, and a lookup takes half the time of making one


def _keep(
    ctx: Any, spec: Spec, storage: Storage, results: tuple[Outputs, Saved], needs: Needs
) -> list[Tensor]:
    """For backward: the storage by reference, and what the backend saved.

    Returns the outputs that have no gradient: of eps alone the KLs have none, z of a prior.
    """
    outputs, saved = results
    ctx.spec = spec
    ctx.set_materialize_grads(False)
    of_first, of_second, of_eps, of_prior_mean, of_prior_scale = needs
    if (
        storage[2] is not None
        or (spec.prior is not None and not (of_prior_mean and of_prior_scale))
        or not of_first
        or not (of_second or storage[1] is None)
    ):
        storage = _kept(spec, storage, needs)
    if saved.samples is not None:
        saved = saved._replace(samples=_readable(saved.samples))
    ctx.save_for_backward(*storage, *saved)
    if of_first or of_second or (of_eps and spec.log_prob is not None):
        return []
    of_prior = of_prior_mean or of_prior_scale
    if spec.log_prob is not None:  # of a prior log_p alone has one
        return [t for t in outputs[: 2 if of_prior else 3] if t is not None]
    constants = (None if of_eps else outputs.z, *(() if of_prior else outputs[1:]))
    return [t for t in constants if t is not None]


def _kept(spec: Spec, storage: Storage, needs: Needs) -> Storage:
    """What to save of an input: of one that no needed gradient reads, all but its values."""
    first, second, *others = storage
    of_prior = spec.prior is not None
    all_read = spec.packed is not None or of_prior or spec.log_prob is not None
    is_read = all_read or needs.scale or needs.eps
    of_first = all_read or needs.mu
    eps, prior_mean, prior_scale = (
        None if t is None else _readable(t) if is_read else _hollow(t) for t in others
    )
    return (
        _readable(first) if of_first else _hollow(first),
        None if second is None else _readable(second) if is_read else _hollow(second),
        eps,
        prior_mean,
        prior_scale,
    )


def _readable(tensor: Tensor) -> Tensor:
    # Autograd keeps no tensor that was made in inference mode; plain code keeps results of it.
    return tensor.clone() if tensor.is_inference() else tensor


def _hollow(tensor: Tensor) -> Tensor:
    return tensor.new_empty(()).expand(tensor.shape)


def _gradients(ctx: Any, upstream: Outputs, needs: Needs) -> OfStorage:
    """Of the storage, by the road that backward finds."""
    dz, dkl, dkl_of_mean = upstream
    if dz is None and dkl is None and dkl_of_mean is None:
        return None, None, None, None, None
    first, second, eps, prior_mean, prior_scale, *results = ctx.saved_tensors
    spec, saved = ctx.spec, Saved(*results)
    storage: Storage = (first, second, eps, prior_mean, prior_scale)
    road: _roads.Road = "composed"  # for create_graph: formulas that torch can see into
    if not torch.is_grad_enabled():
        road = _roads.road(dz, dkl, dkl_of_mean, *storage)
    if road == "direct":
        return _operators.backward(spec, storage, saved, upstream, needs)
    if road == "operator":
        return _operators.call_backward(spec, storage, saved, upstream, needs)
    x = operands(spec, storage)
    redrawn = Saved(noise=drawn_noise(spec, x, saved))
    if spec.log_prob is not None:
        return densities.gradients(spec, x, redrawn, upstream, needs)
    if spec.packed is None:
        return formulas.gradients(spec, x, redrawn, upstream, needs)
    both = needs._replace(scale=needs.mu)
    d_mu, d_scale, d_eps, d_mean, d_prior_scale = formulas.gradients(
        spec, x, redrawn, upstream, both
    )
    whole = None
    if d_mu is not None and d_scale is not None:
        whole = torch.cat([d_mu, d_scale], spec.packed)
    return whole, None, d_eps, d_mean, d_prior_scale


def drawn_noise(spec: Spec, x: Operands, saved: Saved) -> Tensor | None:
    """The noise that forward drew, [B, D], as a constant."""
    if saved.key is None:
        return saved.noise
    key = Key(0, 0, saved.key)
    shape = sizes(x.mu.shape, spec.batch_dims)
    return philox_normal(key, shape, compute_dtype(*x), x.mu.device, saved.samples, spec.samples)


class ReparameterizeKLFunction(torch.autograd.Function):
    """The outputs, None for what is not wanted."""

    @staticmethod
    def forward(ctx: Any, rest: tuple[Spec, Source, Storage], *_: Tensor | None) -> Outputs:
        """One forward launch. `rest`, as one argument, costs autograd less than three."""
        spec, source, storage = rest
        results = _plans.forward(spec, operands(spec, storage), source)
        needs = _needs(*ctx.needs_input_grad[1:])
        constants = _keep(ctx, spec, storage, results, needs)
        if constants:
            ctx.mark_non_differentiable(*constants)
        return results[0]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """One backward launch."""
        dz, dkl, dkl_of_mean = upstream
        needs = _needs(*ctx.needs_input_grad[1:])
        return None, *_gradients(ctx, Outputs(dz, dkl, dkl_of_mean), needs)


#: `Function.apply` without the wrapper that handles torch.func: under a transform no tensor is
#: plain.
_apply: Callable[..., Results] = super(torch.autograd.Function, ReparameterizeKLFunction).apply


def _operator_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    first, others, _, _, samples, text = inputs
    spec, tensors = from_text(text), [first, *others]
    needs = stored(spec, ctx.needs_input_grad[: len(tensors)])
    outputs, saved = named(spec, output)
    results = outputs, saved._replace(samples=None if saved.key is None else samples)
    given = Needs(*(bool(need) for need in needs))
    constants = _keep(ctx, spec, stored(spec, tensors), results, given)
    ctx.mark_non_differentiable(*constants, *(t for t in saved if t is not None))


def _operator_backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    found, _ = named(ctx.spec, upstream)
    of_first, of_others, *_ = ctx.needs_input_grad
    needs = stored(ctx.spec, [of_first, *of_others])
    first, *others = _gradients(ctx, found, Needs(*(bool(need) for need in needs)))
    there = stored(ctx.spec, [True] * (1 + len(of_others)))[1:]
    return first, [t for t, is_there in zip(others, there) if is_there], None, None, None, None


_registry.differentiate("reparameterize_kl", _operator_backward, _operator_context)
