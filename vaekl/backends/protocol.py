"""What a backend is, and the little that all of them use.

Backends and the registry of them (``__init__``) import this; it imports neither.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from vaekl._spec import Gradients, Into, Needs, Operands, Outputs, Saved, Source, Spec

#: Plans in a table, of kinds of calls or of the sizes of a kind: sizes that keep changing rarely
#: come back, and a plan takes some KB.
MOST = 256

Forward = Callable[[Operands, Source], tuple[Outputs, Saved]]
Backward = Callable[[Operands, Saved, Outputs, Into | None], Gradients]
PlanForward = Callable[[Spec, Operands], Forward]
PlanBackward = Callable[[Spec, Operands, Outputs, Needs, Into | None], Backward]


class Backend(Protocol):
    """A module, or any object, that computes.

    ``forward`` and ``backward`` are given the tensors of one call and plan all calls that are like
    it: what they return is kept and run. A Spec with `log_prob` asks for log densities in place of
    KLs, one with `samples` for the noise of those of the Source, which are kept for backward.
    """

    def why_not(self, device: str) -> str | None:
        """What keeps it from running on a type of device, as "needs ..."; None: nothing."""

    def forward(self, spec: Spec, x: Operands) -> Forward:
        """(outputs, saved) of tensors like these."""

    def backward(
        self, spec: Spec, x: Operands, upstream: Outputs, needs: Needs, into: Into | None
    ) -> Backward:
        """The gradients that are needed, of tensors like these; those of mu and scale written into
        tensors like ``into``, where the caller allocates them."""

    def statistics(self, mu: Tensor, logvar: Tensor, batch_dims: int) -> Tensor:
        """The rows of ``diagnostics.statistics.ROWS``, float64 [9, D]."""


class UnavailableError(ImportError):
    """Raised by a backend's module as it is imported; says why, as "needs ..."."""


def remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Keep a plan, and no more than MOST: the oldest go, some at a time."""
    if len(known) >= MOST:
        for oldest in list(known)[: len(known) - MOST * 3 // 4]:
            known.pop(oldest, None)  # another thread may have been faster
    known[key] = value


def interpreting() -> bool:
    """Do Triton's kernels run under its interpreter?"""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def told(error: Exception) -> str:
    """An error in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
