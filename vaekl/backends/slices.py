"""KLs of samples that two strides tell apart, in place: a launch for each index of the first axis.

Such as of ``x.movedim(1, -1)`` with ``batch_dims=3``, a KL for each pixel. Where nothing is summed
over the samples or drawn, slices have nothing to do with each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vaekl._spec import Gradients, Into, Needs, Operands, Outputs, Saved, Source, Spec

from .memory import allocator
from .protocol import Backward, Forward, PlanBackward, PlanForward

#: Elements of a slice, at least: a launch for fewer takes longer than to copy them.
LEAST = 16384


def of_slices(spec: Spec, x: Operands) -> Spec | None:
    """The Spec of one slice; None where tensors may not be cut, or there are those of a prior."""
    apart = spec.reduction == "none" and spec.mean_over is None and not spec.sample
    apart = apart and spec.prior is None
    if not apart or spec.batch_dims < 2 or x.mu.numel() < LEAST * x.mu.shape[0]:
        return None
    return spec._replace(batch_dims=spec.batch_dims - 1)


def forward_of_slices(part: Spec, x: Operands, plan: PlanForward) -> Forward:
    """A launch for each slice; `part`: the Spec of one, `plan`: the backend's."""
    one = plan(part, Operands(x.mu[0], x.scale[0]))

    def run(x: Operands, _: Source) -> tuple[Outputs, Saved]:
        parts = [one(Operands(m, v), Source())[0].kl for m, v in zip(x.mu, x.scale)]
        return Outputs(kl=torch.stack([kl for kl in parts if kl is not None])), Saved()

    return run


def backward_of_slices(
    part: Spec, x: Operands, dkl: Tensor, needs: Needs, into: Into | None, plan: PlanBackward
) -> Backward:
    """A launch for each slice; `part`: the Spec of one, `plan`: the backend's."""
    new_mu, new_scale = allocator(x.mu, x.mu.dtype), allocator(x.scale, x.scale.dtype)
    first = Into(new_mu(x.mu)[0], new_scale(x.scale)[0])
    if into is not None:
        first = Into(into.mu[0], into.scale[0])
    one = plan(
        part,
        Operands(x.mu[0], x.scale[0]),
        Outputs(kl=dkl[0]),
        Needs(True, True, False),
        first,
    )

    def run(x: Operands, saved: Saved, upstream: Outputs, into: Into | None) -> Gradients:
        d_mu, d_scale = (new_mu(x.mu), new_scale(x.scale)) if into is None else into
        if upstream.kl is not None:
            for m, v, g, *slices in zip(x.mu, x.scale, upstream.kl, d_mu, d_scale):
                one(Operands(m, v), saved, Outputs(kl=g), Into(*slices))
        return Gradients(d_mu if needs.mu else None, d_scale if needs.scale else None)

    return run
