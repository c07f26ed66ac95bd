"""What launchers of kernels share: tensors that three strides each describe, copies of others,
and memory for gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _layout
from ._eager import Backward, Forward
from ._memory import allocator
from ._options import Options

Strides = tuple[int, ...]
Operands = list[Tensor | None]

_NO_STRIDES = (0, 0, 0)


class Arrangement(NamedTuple):
    """A common view, and (row, outer, inner) of each operand, zeros for one that is absent."""

    view: _layout.View
    strides: list[tuple[int, int, int]]
    like_mu: bool = False  # every gradient has its layout, not that of its own input
    dkl_row: int = 0  # stride of the upstream gradient of kl


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
    if _are_rows(mu, logvar, eps, None, options.batch_dims):
        return _rows(mu, (True, True, eps is not None, options.sample))
    z = torch.empty_like(mu) if options.sample else None
    return _arrange([mu, logvar, eps], [z], mu, options.batch_dims)


def _are_rows(
    mu: Tensor, logvar: Tensor, eps: Tensor | None, dz: Tensor | None, batch_dims: int
) -> bool:
    """Contiguous [B, D], as most are? So is then what is allocated like them."""
    return (
        batch_dims == 1
        and mu.dim() == 2
        and mu.is_contiguous()
        and logvar.is_contiguous()
        and (eps is None or eps.is_contiguous())
        and (dz is None or dz.is_contiguous())
    )


def _rows(mu: Tensor, present: tuple[bool, ...]) -> Arrangement:
    batch, event = mu.shape
    strides = (event, 0, 1)
    view = _layout.rows(batch, event, sum(present))
    return Arrangement(view, [strides if is_there else _NO_STRIDES for is_there in present])


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
    if into is None and not wide and _are_rows(mu, logvar, eps, dz, batch_dims):
        inputs_there = (True, True, eps is not None, dz is not None)
        rows_of = _rows(mu, (*inputs_there, needs[0], needs[1], needs[2] and eps is not None))
        return rows_of._replace(dkl_row=dkl_row)
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


def dense(shape: Sequence[int]) -> tuple[Strides, Strides]:
    """Shape and strides of a contiguous tensor, for torch.empty_strided.

    It takes less of the host's time than torch.empty; torch.empty_like of an expanded tensor may
    keep strides of 0.
    """
    if len(shape) < 2:
        return tuple(shape), (1,) * len(shape)
    return tuple(shape), torch.empty(shape, device="meta").stride()


class GradientMemory:
    """Allocates (dmu, dlogvar, deps), None where not needed."""

    def __init__(
        self, inputs: Sequence[Tensor | None], needs: Sequence[bool], like_mu: bool
    ) -> None:
        self.like_mu = like_mu
        models = [inputs[0]] * 3 if like_mu else inputs
        self.dmu, self.dlogvar, self.deps = (
            allocator(model, t.dtype) if need and t is not None and model is not None else None
            for model, t, need in zip(models, inputs, needs)
        )

    def __call__(
        self,
        mu: Tensor,
        logvar: Tensor,
        eps: Tensor | None,
        into: tuple[Tensor, Tensor] | None,
    ) -> Backward:
        """`into`: that of the first two, if the caller has it."""
        dmu = dlogvar = deps = None
        if into is not None:
            dmu, dlogvar = into
        else:
            if self.dmu is not None:
                dmu = self.dmu(mu)
            if self.dlogvar is not None:
                dlogvar = self.dlogvar(mu if self.like_mu else logvar)
        if self.deps is not None and eps is not None:
            deps = self.deps(mu if self.like_mu else eps)
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


def forward_planner(plan: Callable[..., Callable[..., Forward]]) -> Callable[..., Any]:
    """A backend's plan_forward, of what makes a plan for tensors that strides describe."""

    def plan_forward(
        mu: Tensor, logvar: Tensor, eps: Tensor | None, options: Options
    ) -> Callable[..., Forward]:
        arrangement = arrange_forward(mu, logvar, eps, options)
        if arrangement is None:
            return _ForwardOfCopies(plan_forward, options)
        return plan(arrangement, mu, logvar, eps, options)

    return plan_forward


def backward_planner(prepare: Callable[..., Callable[..., None]]) -> Callable[..., Any]:
    """A backend's plan_backward, of what gives a launch on all tensors, the gradients last."""

    def plan_backward(
        mu: Tensor,
        logvar: Tensor,
        eps: Tensor | None,
        dz: Tensor | None,
        dkl: Tensor | None,
        options: Options,
        needs: tuple[bool, bool, bool],
        into: tuple[Tensor, Tensor] | None,
    ) -> Callable[..., Backward]:
        arrangement = arrange_backward(mu, logvar, eps, dz, dkl, options, needs, into)
        if arrangement is None:
            return _BackwardOfCopies(plan_backward, options, needs)
        new_gradients = GradientMemory((mu, logvar, eps), needs, arrangement.like_mu)
        launch = prepare(arrangement, mu, logvar, eps, dz, options, into is not None)

        def run(
            mu: Tensor,
            logvar: Tensor,
            eps: Tensor | None,
            *others: Tensor | None,  # dz, dkl, dkl_of_mean, state, means
            into: tuple[Tensor, Tensor] | None,
        ) -> Backward:
            gradients = new_gradients(mu, logvar, eps, into)
            launch(mu, logvar, eps, *others, *gradients)
            return gradients

        return run

    return plan_backward


class _ForwardOfCopies:
    """A backend's forward where three strides cannot describe some tensor."""

    def __init__(self, plan_forward: Callable[..., Callable[..., Forward]], options: Options):
        self.plan, self.options = plan_forward, options
        self.run: Callable[..., Forward] | None = None

    def __call__(
        self,
        mu: Tensor,
        logvar: Tensor,
        eps: Tensor | None,
        generator: torch.Generator | None,
        seed: int | None,
    ) -> Forward:
        model, (logvar, eps) = arranged(mu, (logvar, eps), self.options.batch_dims)
        if self.run is None:
            self.run = self.plan(model, logvar, eps, self.options)
        z, *others = self.run(model, logvar, eps, generator, seed)
        return _restored(z, mu), others[0], others[1], others[2], others[3]


class _BackwardOfCopies:
    """A backend's backward where three strides cannot describe some tensor."""

    def __init__(
        self,
        plan_backward: Callable[..., Callable[..., Backward]],
        options: Options,
        needs: tuple[bool, bool, bool],
    ):
        self.plan, self.options, self.needs = plan_backward, options, needs
        self.run: Callable[..., Backward] | None = None

    def __call__(
        self,
        mu: Tensor,
        logvar: Tensor,
        eps: Tensor | None,
        dz: Tensor | None,
        dkl: Tensor | None,
        dkl_of_mean: Tensor | None,
        state: Tensor | None,
        means: Tensor | None,
        *,
        into: tuple[Tensor, Tensor] | None,
    ) -> Backward:
        model, copies = arranged(mu, (logvar, eps, dz), self.options.batch_dims)
        dkl = None if dkl is None else dkl.contiguous()
        if self.run is None:
            self.run = self.plan(model, *copies, dkl, self.options, self.needs, None)
        results = self.run(model, *copies, dkl, dkl_of_mean, state, means, into=None)
        return (
            _restored(results[0], mu, None if into is None else into[0]),
            _restored(results[1], logvar, None if into is None else into[1]),
            _restored(results[2], eps),
        )
