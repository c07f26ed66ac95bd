"""What launchers of kernels share: plans, and tensors that three strides each describe.

A plan is what sizes, strides, dtypes and options decide about a call, worked out once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _layout
from ._eager import Backward, Forward
from ._memory import empty_like
from ._options import Options

Strides = tuple[int, ...]
Operands = list[Tensor | None]

UNKNOWN: Any = object()
_NO_STRIDES = (0, 0, 0)


class Arrangement(NamedTuple):
    """A common view, and (row, outer, inner) of each operand, zeros for one that is absent."""

    view: _layout.View
    strides: list[tuple[int, int, int]]
    like_mu: bool = False  # every gradient has its layout, not that of its own input
    dkl_row: int = 0  # stride of the upstream gradient of kl


def remember(plans: dict[Any, Any], key: Any, plan: Any) -> None:
    """Keep a plan; start afresh where shapes keep changing."""
    if len(plans) >= 4096:
        plans.clear()
    plans[key] = plan


def signature(tensor: Tensor | None) -> Any:
    """What a plan may depend on."""
    return None if tensor is None else (tensor.stride(), tensor.dtype)


def layout(into: tuple[Tensor, Tensor] | None) -> Any:
    """What a plan may depend on of dmu and dlogvar that the caller has allocated."""
    return None if into is None else (into[0].stride(), into[1].stride())


def _strides(tensors: Sequence[Tensor | None]) -> tuple[Strides, ...]:
    return tuple(t.stride() for t in tensors if t is not None)


def _arrange(
    inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None], mu: Tensor, batch_dims: int
) -> Arrangement | None:
    tensors = [*inputs, *outputs]
    view = _layout.view(tuple(mu.shape), batch_dims, _strides(tensors))
    if view is None:
        return None
    strides = iter(view.strides)
    operands = [_NO_STRIDES if t is None else next(strides) for t in tensors]
    return Arrangement(view, operands)


def arrange_forward(
    mu: Tensor, logvar: Tensor, eps: Tensor | None, options: Options
) -> Arrangement | None:
    """Of mu, logvar, eps, z; None where a tensor has to be copied first."""
    z = torch.empty_like(mu) if options.sample else None
    return _arrange([mu, logvar, eps], [z], mu, options.batch_dims)


def arrange_backward(
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    dz: Tensor | None,
    dkl: Tensor | None,
    options: Options,
    needs: tuple[bool, bool, bool],
    into: tuple[Tensor, Tensor] | None = None,
) -> Arrangement | None:
    """Of mu, logvar, eps, dz, dmu, dlogvar, deps; None where a tensor has to be copied first.

    `into`: dmu and dlogvar that the caller has allocated.
    """
    batch_dims = options.batch_dims
    dkl_row, wide = 0, False
    if dkl is not None and options.reduction == "none":
        rows = _layout.view(tuple(dkl.shape), batch_dims, (dkl.stride(),))
        if rows is None:
            return None
        dkl_row, wide = rows.strides[0][0], rows.wide
    inputs = [mu, logvar, eps]
    # Each gradient has the layout of its input, or else that of mu.
    for like_mu in (False, True):
        models = [mu] * 3 if like_mu else inputs
        likes = [None if m is None or not n else torch.empty_like(m) for m, n in zip(models, needs)]
        if into is not None:
            likes[:2] = into
        found = _arrange([*inputs, dz], likes, mu, batch_dims)
        if found is not None:
            view = found.view._replace(wide=found.view.wide or wide)
            return found._replace(view=view, like_mu=like_mu, dkl_row=dkl_row)
    return None


def empty_gradients(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    needs: tuple[bool, bool, bool],
    like_mu: bool,
    into: tuple[Tensor, Tensor] | None,
) -> Backward:
    """Memory for (dmu, dlogvar, deps), None where not needed; `into`: that of the first two."""
    mu, logvar, eps = inputs
    dmu = dlogvar = deps = None
    if into is not None:
        dmu, dlogvar = into
    else:
        if needs[0]:
            dmu = empty_like(mu, mu.dtype)
        if needs[1]:
            dlogvar = empty_like(mu if like_mu else logvar, logvar.dtype)
    if needs[2] and eps is not None:
        deps = empty_like(mu if like_mu else eps, eps.dtype)
    return dmu, dlogvar, deps


def arranged(
    first: Tensor, others: Sequence[Tensor | None], batch_dims: int
) -> tuple[Tensor, list[Any]]:
    """The tensors, each copied only if three strides cannot describe it beside those before it."""
    shape = tuple(first.shape)
    model = torch.empty_like(first)
    if _layout.view(shape, batch_dims, _strides([first, model])) is None:
        model = first = first.contiguous()
    kept: Operands = [first]
    for tensor in others:
        if tensor is not None:
            if _layout.view(shape, batch_dims, _strides([model, *kept, tensor])) is None:
                tensor = torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)
        kept.append(tensor)
    return first, kept[1:]


def _restored(
    result: Tensor | None, model: Tensor | None, into: Tensor | None = None
) -> Tensor | None:
    """A result for copied inputs, in the memory format of what came in or where it is wanted."""
    if result is None or model is None:
        return result
    if into is not None:
        return into.copy_(result)
    return torch.empty_like(model, dtype=result.dtype).copy_(result)


def forward_of_copies(
    forward: Callable[..., Forward],
    mu: Tensor,
    logvar: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    seed: int | None,
    options: Options,
) -> Forward:
    """A backend's forward where three strides cannot describe some tensor."""
    model, (logvar, eps) = arranged(mu, (logvar, eps), options.batch_dims)
    z, *others = forward(model, logvar, eps, generator, seed, options)
    return _restored(z, mu), others[0], others[1], others[2], others[3]


def backward_of_copies(
    backward: Callable[..., Backward],
    inputs: tuple[Tensor, Tensor, Tensor | None],
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None],
    kept: tuple[Tensor | None, Tensor | None],
    options: Options,
    needs: tuple[bool, bool, bool],
    into: tuple[Tensor, Tensor] | None,
) -> Backward:
    """A backend's backward where three strides cannot describe some tensor.

    inputs: mu, logvar, eps; upstream: dz, dkl, dkl_of_mean; kept from forward: state, means.
    """
    mu, logvar, eps = inputs
    dz, dkl, dkl_of_mean = upstream
    model, copies = arranged(mu, (logvar, eps, dz), options.batch_dims)
    dkl = None if dkl is None else dkl.contiguous()
    results = backward(model, *copies, dkl, dkl_of_mean, *kept, options, needs)
    return (
        _restored(results[0], mu, None if into is None else into[0]),
        _restored(results[1], logvar, None if into is None else into[1]),
        _restored(results[2], eps),
    )
