"""KLs of samples that two strides tell apart, in place: a launch for each index of the first axis.

Such as of ``x.movedim(1, -1)`` with ``batch_dims=3``, a KL for each pixel. Where nothing is summed
over the samples or drawn, slices have nothing to do with each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._eager import Backward, Forward
from ._memory import allocator
from ._options import Options
from ._plans import arrange_backward, arrange_forward

#: Elements of a slice, at least: a launch for fewer takes longer than to copy them.
LEAST = 16384
Plan = Callable[..., Any]


def _of_slices(mu: Tensor, options: Options) -> Options | None:
    """Options of one slice; None where tensors may not be cut."""
    apart = options.reduction == "none" and options.mean_over is None and not options.sample
    if not apart or options.batch_dims < 2 or mu.numel() < LEAST * mu.shape[0]:
        return None
    return options._replace(batch_dims=options.batch_dims - 1)


def forward_planner(plan: Plan) -> Plan:
    """plan_forward that cuts where it helps, of one that does not."""

    def plan_forward(mu: Tensor, logvar: Tensor, eps: Tensor | None, options: Options) -> Plan:
        part = _of_slices(mu, options)
        if part is None or arrange_forward(mu, logvar, eps, options) is not None:
            whole: Plan = plan(mu, logvar, eps, options)
            return whole
        one = plan_forward(mu[0], logvar[0], None, part)

        def run(mu: Tensor, logvar: Tensor, *_: Any) -> Forward:
            parts = [one(m, v, None, None, None)[1] for m, v in zip(mu, logvar)]
            return None, torch.stack(parts), None, None, None

        return run

    return plan_forward


def backward_planner(plan: Plan) -> Plan:
    """plan_backward that cuts where it helps, of one that does not."""

    def plan_backward(
        mu: Tensor,
        logvar: Tensor,
        eps: Tensor | None,
        dz: Tensor | None,
        dkl: Tensor | None,
        options: Options,
        needs: tuple[bool, bool, bool],
        into: tuple[Tensor, Tensor] | None,
    ) -> Plan:
        part = _of_slices(mu, options)
        if (
            part is None
            or dkl is None
            or arrange_backward(mu, logvar, eps, dz, dkl, options, needs, into) is not None
        ):
            whole: Plan = plan(mu, logvar, eps, dz, dkl, options, needs, into)
            return whole
        new_dmu, new_dlogvar = allocator(mu, mu.dtype), allocator(logvar, logvar.dtype)
        results = (new_dmu(mu), new_dlogvar(logvar)) if into is None else into
        slices = results[0][0], results[1][0]
        one = plan_backward(mu[0], logvar[0], None, None, dkl[0], part, (True, True, False), slices)

        def run(
            mu: Tensor,
            logvar: Tensor,
            eps: Tensor | None,
            dz: Tensor | None,
            dkl: Tensor,
            *_: Any,
            into: tuple[Tensor, Tensor] | None,
        ) -> Backward:
            dmu, dlogvar = (new_dmu(mu), new_dlogvar(logvar)) if into is None else into
            for m, v, g, *slices in zip(mu, logvar, dkl, dmu, dlogvar):
                one(m, v, None, None, g, None, None, None, into=tuple(slices))
            return dmu if needs[0] else None, dlogvar if needs[1] else None, None

        return run

    return plan_backward
