"""CPU kernels, compiled by numba: the twin of ``kernels/X.py`` is ``kernels/cpu/X.py``.

Reading order: ``walk`` (how work is divided), ``gaussian``, ``forms``, ``prior``, ``philox``,
``reduction``, ``tile``, then ``forward``, ``gradients``, ``backward``, ``log_prob``,
``log_prob_backward`` and ``statistics``. Below them: ``plan`` (what the host tells them),
``numeric``, ``storage`` and ``memory`` (numbers, dtypes, addresses), ``team`` (threads), ``mode``
(rounding) and ``cache`` (compiled code on disk).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from . import backward, forward, log_prob, log_prob_backward, statistics
from .cache import keep_on_disk
from .forms import FORMS
from .memory import BLOCK
from .plan import ALL, BATCH, NONE, Plan, pack, resized
from .storage import BF16, F16, F32, F64
from .walk import WORKERS

__all__ = [
    "ALL",
    "BACKWARD",
    "BACKWARD_TO_PRIOR",
    "BATCH",
    "BF16",
    "BLOCK",
    "COLUMN_SUMS",
    "F16",
    "F32",
    "F64",
    "FORMS",
    "FORWARD",
    "FORWARD_TO_PRIOR",
    "LOG_PROB",
    "LOG_PROB_BACKWARD",
    "NONE",
    "STATISTICS",
    "WORKERS",
    "Kernel",
    "Plan",
    "pack",
    "resized",
]


class Kernel(NamedTuple):
    """A compiled function, and the memory that it works in."""

    run: Any
    buffers: int  # blocks of BLOCK elements, for each worker
    scratch_size: Callable[[Plan], int]  # float64 zeros, for all


FORWARD = Kernel(forward.forward_kernel, forward.BUFFERS, forward.scratch_size)
BACKWARD = Kernel(backward.backward_kernel, backward.BUFFERS, backward.scratch_size)
FORWARD_TO_PRIOR = Kernel(
    forward.forward_to_prior_kernel, forward.PRIOR_BUFFERS, forward.scratch_size
)
BACKWARD_TO_PRIOR = Kernel(
    backward.backward_to_prior_kernel, backward.PRIOR_BUFFERS, backward.scratch_size
)
LOG_PROB = Kernel(log_prob.log_prob_forward_kernel, log_prob.BUFFERS, log_prob.scratch_size)
LOG_PROB_BACKWARD = Kernel(
    log_prob_backward.log_prob_backward_kernel,
    log_prob_backward.BUFFERS,
    log_prob_backward.scratch_size,
)
STATISTICS = Kernel(statistics.statistics_kernel, statistics.BUFFERS, statistics.scratch_size)
COLUMN_SUMS = statistics.COLUMN_SUMS

for _kernel in (
    FORWARD, BACKWARD, FORWARD_TO_PRIOR, BACKWARD_TO_PRIOR, LOG_PROB, LOG_PROB_BACKWARD, STATISTICS,
):  # fmt: skip
    keep_on_disk(_kernel.run)
