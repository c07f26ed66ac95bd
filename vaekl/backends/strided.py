"""What launchers of kernels share: tensors that three strides each describe, copies of others,
and memory for gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vaekl._spec import Gradients, Into, Needs, Operands, Outputs, Saved, Source, Spec

from . import layout
from .memory import allocator
from .protocol import Backward, Forward, PlanBackward, PlanForward

Strides = tuple[int, ...]

_NO_STRIDES = (0, 0, 0)


class Arrangement(NamedTuple):
    """A common view, and (row, outer, inner) of each tensor, zeros for one that is absent."""

    view: layout.View
    strides: list[tuple[int, int, int]]
    like_mu: bool = False  # every gradient has its layout, not that of its own input
    dkl_row: int = 0  # stride of the upstream gradient of kl, or of log_q
    dsecond_row: int = 0  # of that of log_p


def _strides(tensors: Sequence[Tensor | None]) -> tuple[Strides, ...]:
    return tuple(t.stride() for t in tensors if t is not None)


def spread(spec: Spec, x: Operands) -> Operands:
    """With a prior that all samples share as if each had its own."""
    if spec.prior != "event" or x.prior_mean is None or x.prior_scale is None:
        return x
    mean, scale = (t.expand(x.mu.shape) for t in (x.prior_mean, x.prior_scale))
    return x._replace(prior_mean=mean, prior_scale=scale)


def _arrange(
    tensors: Sequence[Tensor | None], mu: Tensor, batch_dims: int, parameters: Sequence[int] = ()
) -> Arrangement | None:
    """`parameters`: which of them may be one draw's, if there are several."""
    shape, strides = tuple(mu.shape), _strides(tensors)
    view = layout.view(shape, batch_dims, strides)
    if view is None and parameters:
        own = tuple(i in parameters for i, t in enumerate(tensors) if t is not None)
        view = layout.view_of_draws(shape, batch_dims, strides, own)
    if view is None:
        return None
    found = iter(view.strides)
    return Arrangement(view, [_NO_STRIDES if t is None else next(found) for t in tensors])


def _are_rows(x: Operands, batch_dims: int) -> bool:
    """Contiguous [B, D], as most are? So is then what is allocated like them."""
    mu, scale, eps, prior, _ = x
    return (
        batch_dims == 1
        and prior is None
        and mu.dim() == 2
        and mu.is_contiguous()
        and scale.is_contiguous()
        and (eps is None or eps.is_contiguous())
    )


def _rows(mu: Tensor, present: tuple[bool, ...]) -> Arrangement:
    batch, event = mu.shape
    strides = (event, 0, 1)
    view = layout.rows(batch, event, sum(present))
    return Arrangement(view, [strides if is_there else _NO_STRIDES for is_there in present])


def _parameters(spec: Spec, prior_at: int) -> tuple[int, ...]:
    """Of tensors arranged, mu, the scale and a prior, where kernels can read them once a draw."""
    if spec.log_prob is None:
        return ()
    return (0, 1, prior_at, prior_at + 1) if spec.prior == "sample" else (0, 1)


def arrange_forward(spec: Spec, x: Operands) -> Arrangement | None:
    """Of mu, scale, eps, z and the prior; None where a tensor has to be copied first."""
    if _are_rows(x, spec.batch_dims):
        return _rows(x.mu, (True, True, x.eps is not None, spec.sample, False, False))
    z = torch.empty_like(x.mu) if spec.sample else None
    *inputs, mean, scale = spread(spec, x)
    parameters = _parameters(spec, prior_at=4)
    return _arrange([*inputs, z, mean, scale], x.mu, spec.batch_dims, parameters)


def arrange_inputs(mu: Tensor, logvar: Tensor, batch_dims: int) -> Arrangement | None:
    """Of mu and logvar; None where a tensor has to be copied first."""
    return _arrange([mu, logvar], mu, batch_dims)


def _rows_of(gradients: Sequence[Tensor | None]) -> tuple[list[int], bool] | None:
    """The one stride of each (0 of a number), and is any beyond narrow offsets?"""
    rows, wide = [], False
    for gradient in gradients:
        row = 0
        if gradient is not None and gradient.dim():
            found = layout.view(tuple(gradient.shape), gradient.dim(), (gradient.stride(),))
            if found is None:
                return None
            row, wide = found.strides[0][0], wide or found.wide
        rows.append(row)
    return rows, wide


def arrange_backward(
    spec: Spec, x: Operands, upstream: Outputs, needs: Needs, into: Into | None
) -> Arrangement | None:
    """Of mu, scale, eps, dz and the gradients of the first three; then of the prior and, where
    each sample has one, its gradients. None where a tensor has to be copied first.
    """
    mu, batch_dims = x.mu, spec.batch_dims
    dz, *of_kls = upstream
    of_rows = _rows_of(of_kls)
    if of_rows is None:
        return None
    rows, wide = of_rows
    is_number = dz is not None and not any(dz.stride())  # one for all, as of sum().backward()
    if (
        into is None
        and not wide
        and _are_rows(x, batch_dims)
        and (dz is None or is_number or dz.is_contiguous())
    ):
        inputs_there = (True, True, x.eps is not None, dz is not None and not is_number)
        eps_there = needs.eps and x.eps is not None
        there = (*inputs_there, needs.mu, needs.scale, eps_there, False, False, False, False)
        rows_of = _rows(mu, there)
        return rows_of._replace(dkl_row=rows[0], dsecond_row=rows[1])
    # Each gradient has the layout of its input, or else that of mu.
    *inputs, prior_mean, prior_scale = spread(spec, x)
    if spec.prior != "sample":  # then they are sums
        needs = needs._replace(prior_mean=False, prior_scale=False)
    for like_mu in (False, True):
        likes = [
            torch.empty_like(mu if like_mu else m) if m is not None and n else None
            for m, n in zip(x, needs)
        ]
        if into is not None:
            likes[:2] = into
        of_prior = [prior_mean, prior_scale, *likes[3:]]
        tensors = [*inputs, dz, *likes[:3], *of_prior]
        found = _arrange(tensors, mu, batch_dims, _parameters(spec, prior_at=7))
        if found is not None:
            view = found.view._replace(wide=found.view.wide or wide)
            return Arrangement(view, found.strides, like_mu, *rows)
    return None


def in_memory_order(arrangement: Arrangement) -> Arrangement:
    """Of columns, see ``layout.in_memory_order``."""
    view = layout.in_memory_order(arrangement.view)
    if view is arrangement.view:
        return arrangement
    strides = [
        (row, inner if view.split else 0, outer) for row, outer, inner in arrangement.strides
    ]
    return arrangement._replace(view=view, strides=strides)


def end_to_end(arrangement: Arrangement, config: layout.Config) -> Arrangement:
    """As one sample, see ``layout.end_to_end``."""
    view = layout.end_to_end(arrangement.view, config)
    if view is arrangement.view:
        return arrangement
    strides = [(0, 0, inner) for _, _, inner in arrangement.strides]
    return arrangement._replace(view=view, strides=strides)


def beside(arrangement: Arrangement, config: layout.Config, is_drawn: bool) -> Arrangement:
    """Of samples in one row, see ``layout.beside``."""
    view = layout.beside(arrangement.view, config, is_drawn)
    if view is arrangement.view:
        return arrangement
    strides = [(view.beside * row, row, inner) for row, _, inner in arrangement.strides]
    return arrangement._replace(view=view, strides=strides)


def dense(shape: Sequence[int]) -> tuple[Strides, Strides]:
    """Shape and strides of a contiguous tensor, for torch.empty_strided.

    It takes less of the host's time than torch.empty; torch.empty_like of an expanded tensor may
    keep strides of 0.
    """
    if len(shape) < 2:
        return tuple(shape), (1,) * len(shape)
    return tuple(shape), torch.empty(shape, device="meta").stride()


class GradientMemory:
    """Allocates the gradients that are needed."""

    def __init__(self, spec: Spec, x: Operands, needs: Needs, like_mu: bool) -> None:
        self.like_mu = like_mu
        self.mu, self.scale, self.eps, *self.of_prior = (
            allocator(x.mu if like_mu else t, t.dtype) if need and t is not None else None
            for t, need in zip(x, needs)
        )
        self.prior_like_mu = like_mu and spec.prior != "event"
        if spec.prior == "event":  # sums, in the order of their elements
            new = partial(torch.empty_like, memory_format=torch.contiguous_format)
            self.of_prior = [new if need else None for need in needs[3:]]

    def __call__(self, x: Operands, into: Into | None) -> Gradients:
        """Those of mu and scale are `into`, where the caller has allocated them."""
        mu, scale, eps, *prior = x
        d_mu = d_scale = d_eps = None
        if into is not None:
            d_mu, d_scale = into
        else:
            if self.mu is not None:
                d_mu = self.mu(mu)
            if self.scale is not None:
                d_scale = self.scale(mu if self.like_mu else scale)
        if self.eps is not None and eps is not None:
            d_eps = self.eps(mu if self.like_mu else eps)
        if prior[0] is None:
            return Gradients(d_mu, d_scale, d_eps)
        of_prior = (
            None if new is None or t is None else new(mu if self.prior_like_mu else t)
            for new, t in zip(self.of_prior, prior)
        )
        return Gradients(d_mu, d_scale, d_eps, *of_prior)


def arranged(
    x: Operands, dz: Tensor | None, batch_dims: int, prior: str | None = None
) -> tuple[Operands, Tensor | None]:
    """Copies of those tensors that three strides cannot describe together with the ones before
    them; the rest as they are.
    """
    first, shape = x.mu, tuple(x.mu.shape)
    model = torch.empty_like(first)
    if layout.view(shape, batch_dims, _strides([first, model])) is None:
        model = first = first.contiguous()
    kept = [model, first]

    def fit(tensor: Tensor) -> Tensor:
        if layout.view(shape, batch_dims, _strides([*kept, tensor])) is None:
            tensor = torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)
        kept.append(tensor)
        return tensor

    def fit_shared(tensor: Tensor) -> Tensor:
        if layout.view(shape, batch_dims, _strides([*kept, tensor.expand(shape)])) is None:
            one = model[(0,) * batch_dims]
            tensor = torch.empty_like(one, dtype=tensor.dtype).copy_(tensor)
        kept.append(tensor.expand(shape))
        return tensor

    scale = fit(x.scale)
    eps = None if x.eps is None else fit(x.eps)
    fit_prior = fit_shared if prior == "event" else fit
    of_prior = [None if t is None else fit_prior(t) for t in x[3:]]
    return Operands(first, scale, eps, *of_prior), None if dz is None else fit(dz)


def _restored(
    result: Tensor | None, model: Tensor | None, into: Tensor | None = None
) -> Tensor | None:
    """A result for copied inputs, in the memory format of what came in or where it is wanted."""
    if result is None or model is None:
        return result
    if into is not None:
        return into.copy_(result)
    return torch.empty_like(model, dtype=result.dtype).copy_(result)


def forward_of_copies(spec: Spec, plan: PlanForward) -> Forward:
    """A backend's forward where three strides cannot describe some tensor."""
    planned: list[Forward] = []

    def run(x: Operands, source: Source) -> tuple[Outputs, Saved]:
        copies, _ = arranged(x, None, spec.batch_dims, spec.prior)
        if not planned:
            planned.append(plan(spec, copies))
        outputs, saved = planned[0](copies, source)
        return outputs._replace(z=_restored(outputs.z, x.mu)), saved

    return run


def backward_of_copies(
    spec: Spec,
    needs: Needs,
    plan: PlanBackward,
) -> Backward:
    """A backend's backward where three strides cannot describe some tensor."""
    planned: list[Backward] = []

    def run(x: Operands, saved: Saved, upstream: Outputs, into: Into | None) -> Gradients:
        copies, dz = arranged(x, upstream.z, spec.batch_dims, spec.prior)
        given = Outputs(dz, *(None if g is None else g.contiguous() for g in upstream[1:]))
        if not planned:
            planned.append(plan(spec, copies, given, needs, None))
        found = planned[0](copies, saved, given, None)
        return Gradients(
            _restored(found.mu, x.mu, None if into is None else into.mu),
            _restored(found.scale, x.scale, None if into is None else into.scale),
            _restored(found.eps, x.eps),
            *(found[3:] if spec.prior == "event" else map(_restored, found[3:], x[3:])),
        )

    return run
