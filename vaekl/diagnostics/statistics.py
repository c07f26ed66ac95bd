"""Column statistics of a batch: what :mod:`vaekl.diagnostics` is worked out from.

Each backend gives the same sums over the samples, ``[ROWS, D]`` in float64, from one pass over mu
and logvar. All of it is float64, whatever the inputs: a diagnosis is taken now and then, and one
that depended on the precision of the training would be one more thing to doubt.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vaekl import backends
from vaekl._spec import sizes

#: What the sums are of, with s = mu[0] as the shift: a variance from plain sums of squares would
#: cancel where the mean is large. The last row is the shift itself.
ROWS = ("mu - s", "(mu - s)^2", "logvar", "exp(logvar)", "phi(logvar)",
        "mu not finite", "logvar not finite", "logvar outside", "s")  # fmt: skip


class Gaussian(NamedTuple):
    """For each element of an event, float64 on the CPU, [D]."""

    mean: Tensor
    logvar: Tensor


class Statistics(NamedTuple):
    """Of each element of an event, over the samples; float64 and int64 on the CPU, [D].

    Where there is a prior, means, squares, exp and phi are of posteriors in its standard
    deviations.
    """

    samples: int
    event: torch.Size
    mean_mu: Tensor
    squares_mu: Tensor  # sum of (mu - mean_mu)^2
    mean_logvar: Tensor
    mean_exp: Tensor
    mean_phi: Tensor
    nonfinite_mu: Tensor
    nonfinite_logvar: Tensor
    logvar_outside: Tensor
    prior: Gaussian | None = None  # None: N(0, I)


def collect(mu: Tensor, logvar: Tensor, batch_dims: int, backend: str) -> Statistics:
    """The statistics of one batch of at least one sample; waits for the device.

    For a kernel mu and logvar are plain tensors, as the direct road of ``_roads`` has it.
    """
    sums = backends.get(backend).statistics(mu, logvar, batch_dims)
    n = sizes(mu.shape, batch_dims)[0]
    shifted, squares, logvar_sum, exp_sum, phi_sum, *counts, shift = sums.cpu()
    return Statistics(
        n,
        mu.shape[batch_dims:],
        shift + shifted / n,
        (squares - shifted * shifted / n).clamp_min_(0),
        logvar_sum / n,
        exp_sum / n,
        phi_sum / n,
        *(count.long() for count in counts),
    )


def merged(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of all samples of both, to one prior (Chan, Golub & LeVeque 1979).

    Means of mu and logvar move by a share of their distance: where that is 0 they stay what they
    are to the bit, and no variance comes of rounding.
    """
    n = a.samples + b.samples
    of_a, of_b = a.samples / n, b.samples / n
    distance = b.mean_mu - a.mean_mu
    return Statistics(
        n,
        a.event,
        a.mean_mu + of_b * distance,
        a.squares_mu + b.squares_mu + distance * distance * (a.samples * of_b),
        a.mean_logvar + of_b * (b.mean_logvar - a.mean_logvar),
        of_a * a.mean_exp + of_b * b.mean_exp,  # which may be inf
        of_a * a.mean_phi + of_b * b.mean_phi,
        a.nonfinite_mu + b.nonfinite_mu,
        a.nonfinite_logvar + b.nonfinite_logvar,
        a.logvar_outside + b.logvar_outside,
        a.prior,
    )
