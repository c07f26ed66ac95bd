"""The two operators: schemas, fakes, and calls of them.

An operator takes and gives lists of tensors, and the Spec, as text, says which they are: a new
operand, output or option changes no schema. Packed moments are one tensor in place of two, of which
forward reads two views and backward writes both halves: strides are all that packing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _plans, _registry, _validate, backends
from ._spec import (
    Into,
    Needs,
    Operands,
    Outputs,
    Saved,
    Source,
    Spec,
    compute_dtype,
    from_text,
    halves,
    kl_shape,
    needed,
    of_mean_shape,
    sample_dtype,
    sizes,
    to_text,
)
from .backends.memory import empty_like

#: (mu, logvar, eps, *prior) or, packed, (moments, None, eps, *prior); None for what there is not.
Storage = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
#: A gradient for each of its tensors, or None.
OfStorage = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def operands(spec: Spec, storage: Storage) -> Operands:
    """Views of the tensors that were handed in."""
    if type(storage) is Operands:
        return storage
    first, second, *others = storage
    if spec.packed is None and second is not None:
        return Operands(first, second, *others)
    return Operands(*halves(first, spec.packed or 0), *others)


def stored(spec: Spec, present: Sequence[Any]) -> Any:
    """A storage, or what there is of each tensor of one, from a list of those that there are."""
    left = iter(present)
    is_there = (True, spec.packed is None, spec.has_eps, spec.prior is not None)
    return tuple(next(left) if there else None for there in (*is_there, is_there[-1]))


def _wanted(spec: Spec) -> tuple[bool, ...]:
    """Which of Outputs and Saved there are."""
    is_drawn, has_means = spec.sample and not spec.has_eps, spec.mean_over is not None
    has_densities, keeps_noise = spec.log_prob is not None, backends.keeps_noise(spec.backend)
    of_noise = (is_drawn and not keeps_noise, has_means, is_drawn and keeps_noise)
    has_kl = spec.reduction is not None
    return spec.sample, has_kl or has_densities, has_means or has_densities, *of_noise


def named(spec: Spec, results: Sequence[Tensor | None]) -> tuple[Outputs, Saved]:
    """An operator's results, None between them for what is not wanted."""
    left = iter(results)
    z, kl, kl_of_mean, key, means, noise = [
        next(left) if is_wanted else None for is_wanted in _wanted(spec)
    ]
    return Outputs(z, kl, kl_of_mean), Saved(key, means, noise)


def call_forward(spec: Spec, storage: Storage, source: Source) -> tuple[Outputs, Saved]:
    """By the operator."""
    first, *others = storage
    given = [t for t in others if t is not None]
    given_source = source.generator, source.seed, source.samples
    results = torch.ops.vaekl.reparameterize_kl(first, given, *given_source, to_text(spec))
    return named(spec, results)


def call_backward(
    spec: Spec, storage: Storage, saved: Saved, upstream: Outputs, needs: Needs
) -> OfStorage:
    there = [(t, need) for t, need in zip(storage, needs) if t is not None]
    tensors, given = [t for t, _ in there], [need for _, need in there]
    results = torch.ops.vaekl.reparameterize_kl_backward(
        tensors, list(upstream), list(saved), to_text(spec), given
    )
    left = iter(results)
    found = [next(left) if is_given else None for is_given in _returned(spec, upstream, given)]
    of_storage: OfStorage = stored(spec, found)
    return of_storage


def backward(
    spec: Spec, storage: Storage, saved: Saved, upstream: Outputs, needs: Needs
) -> OfStorage:
    """Gradients of the storage by the backend; of packed moments in one tensor, and no copy."""
    x = operands(spec, storage)
    if spec.packed is None:
        return _plans.backward(spec, x, saved, upstream, needs)
    moments = storage[0]
    whole = into = None
    if needs.mu:
        whole = empty_like(moments, moments.dtype)
        into = Into(*halves(whole, spec.packed))
    both = needs._replace(scale=needs.mu)
    return whole, None, *_plans.backward(spec, x, saved, upstream, both, into)[2:]


def _checked(spec: Spec, tensors: list[Tensor]) -> Operands:
    """The operands of a program's call. It may be wrong, and its kind be known all the same."""
    count = (1 if spec.packed is not None else 2) + spec.has_eps + 2 * (spec.prior is not None)
    if len(tensors) != count:
        raise ValueError(f"this spec is of {count} tensors, got {len(tensors)}")
    if spec.packed is not None:
        _validate.moments(tensors[0], spec.packed)
        if spec.log_prob is not None:
            raise ValueError("log densities are of mu and logvar, not of packed moments")
    x = operands(spec, stored(spec, tensors))
    _validate.parameters(x, spec.batch_dims, spec.prior)
    return x


def _check_samples(spec: Spec, mu: Tensor, samples: Tensor | None) -> None:
    """They are as many as the kernels read."""
    batch, _ = sizes(mu.shape, spec.batch_dims)
    expected = found = "None"
    if spec.samples is not None:
        count = batch if spec.samples == "ids" else 2 * batch
        expected = f"{count} of torch.int64 on {mu.device}"
    if samples is not None:
        found = f"{samples.numel()} of {samples.dtype} on {samples.device}"
    if found != expected:
        raise ValueError(f"samples must be {expected} for this spec, got {found}")


def _check_backward(spec: Spec, x: Operands, saved: Saved, upstream: Outputs) -> None:
    """Kernels read as much of these as the shape of mu says."""
    names = ("z", "kl", "kl_of_mean") if spec.log_prob is None else ("z", "log_q", "log_p")
    if all(gradient is None for gradient in upstream):
        raise ValueError(f"at least one of the gradients of {', '.join(names)} must be given")
    batch, event = sizes(x.mu.shape, spec.batch_dims)
    shape = x.mu.shape
    shapes = (shape, kl_shape(spec, shape), of_mean_shape(spec, shape))
    for name, gradient, expected in zip(names, upstream, shapes):
        if gradient is not None and gradient.shape != expected:
            raise ValueError(
                f"the gradient of {name} must have shape {tuple(expected)}, got "
                f"{tuple(gradient.shape)}"
            )
    counts = {"key": 2, "means": 2 * event if spec.mean_over == "batch" else 2}
    counts["noise"] = batch * event
    if _wanted(spec)[3]:  # a key
        _check_samples(spec, x.mu, saved.samples)
    for (name, tensor), is_there in zip(saved._asdict().items(), _wanted(spec)[3:]):
        if is_there and (tensor is None or tensor.numel() != counts[name]):
            found = "None" if tensor is None else f"shape {tuple(tensor.shape)}"
            raise ValueError(f"saved {name} must have {counts[name]} elements, got {found}")


def _forward_operator(
    first: Tensor,
    others: list[Tensor],
    generator: torch.Generator | None,
    seed: int | None,
    samples: Tensor | None,
    text: str,
) -> list[Tensor]:
    spec = from_text(text)
    x = _checked(spec, [first, *others])
    _check_samples(spec, x.mu, samples)
    outputs, saved = _plans.forward(spec, x, Source(generator, seed, samples, spec.samples))
    return [t for t in (*outputs, *saved[:3]) if t is not None]


def _forward_fake(
    first: Tensor,
    others: list[Tensor],
    generator: torch.Generator | None,
    seed: int | None,
    samples: Tensor | None,
    text: str,
) -> list[Tensor]:
    spec = from_text(text)
    x = operands(spec, stored(spec, [first, *others]))
    mu, dtype = x.mu, compute_dtype(*x)
    batch, event = sizes(mu.shape, spec.batch_dims)
    means = (2, event) if spec.mean_over == "batch" else (2,)
    results = (
        torch.empty_like(mu, dtype=sample_dtype(*x[:3])),
        mu.new_empty(kl_shape(spec, mu.shape), dtype=dtype),
        mu.new_empty(of_mean_shape(spec, mu.shape), dtype=dtype),
        mu.new_empty(2, dtype=torch.int64),
        mu.new_empty(means, dtype=dtype),
        mu.new_empty((batch, event), dtype=dtype),
    )
    return [t for t, is_wanted in zip(results, _wanted(spec)) if is_wanted]


def _backward_operator(
    storage: list[Tensor],
    upstream: list[Tensor | None],
    saved: list[Tensor | None],
    text: str,
    needs: list[bool],
) -> list[Tensor]:
    spec = from_text(text)
    results = Saved(*saved), Outputs(*upstream)
    _check_backward(spec, _checked(spec, storage), *results)
    given = Needs(*(bool(need) for need in stored(spec, needs)))
    found = backward(spec, stored(spec, storage), *results, given)
    return [t for t in found if t is not None]


def _backward_fake(
    storage: list[Tensor],
    upstream: list[Tensor | None],
    saved: list[Tensor | None],
    text: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients look like what they are of; those of a prior that samples share are sums, in the
    order of its elements.
    """
    spec = from_text(text)
    returned = _returned(spec, Outputs(*upstream), needs)
    shared = len(storage) - (2 if spec.prior == "event" else 0)
    return [
        torch.empty_like(t) if i < shared else t.new_empty(t.shape)
        for i, (t, need) in enumerate(zip(storage, returned))
        if need
    ]


def _returned(spec: Spec, upstream: Outputs, needs: Sequence[bool]) -> list[bool]:
    """Which gradients the backward operator returns."""
    given = Needs(*(bool(need) for need in stored(spec, needs)))
    found = needed(spec, given, upstream)
    there = stored(spec, [True] * len(needs))
    return [need for need, is_there in zip(found, there) if is_there]


# The first tensor by itself: where a draw is made again in backward, torch looks there for the
# device whose generator's state it has to keep.
_registry.define(
    "reparameterize_kl",
    "(Tensor first, Tensor[] others, Generator? generator, SymInt? seed, Tensor? samples, str spec)"
    " -> Tensor[]",
    (torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
    _forward_operator,
    _forward_fake,
)
_registry.define(
    "reparameterize_kl_backward",
    "(Tensor[] storage, Tensor?[] upstream, Tensor?[] saved, str spec, bool[] needs) -> Tensor[]",
    (torch.Tag.pt2_compliant_tag,),
    _backward_operator,
    _backward_fake,
)
