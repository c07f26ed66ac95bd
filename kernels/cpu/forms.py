"""CPU code: forms of a scale, the twin of ``forms`` (what one is, is said there).

A number chooses a pass over a block: nothing is asked in its loop, and one compiled kernel serves
all forms.
"""

import numpy as np
from numba import njit

from .numeric import JIT

SAME, CLAMPED = range(2)
FORMS = {"logvar": SAME, "clamped": CLAMPED}


@njit(**JIT)
def clamp(values, low, high, out):
    """torch.clamp: NaN passes."""
    for i in range(len(values)):
        value = values[i]
        value = low if value < low else value
        out[i] = high if value > high else value


@njit(**JIT)
def zero_outside(values, low, high, gradient):
    """The gradient of clamp: 0 at its bounds, too; an infinite one is none."""
    zero = gradient.dtype.type(0)
    open_low, open_high = low == -np.inf, high == np.inf
    for i in range(len(values)):
        inside = ((values[i] > low) | open_low) & ((values[i] < high) | open_high)
        gradient[i] = gradient[i] if inside else zero


@njit(**JIT)
def logvar_of(plan, scale, out):
    """logvar of a block: the scale itself, or in out."""
    if plan.form == CLAMPED:
        dtype = out.dtype.type
        clamp(scale, dtype(plan.low), dtype(plan.high), out)
        return out
    return scale


@njit(**JIT)
def to_gradient_of_scale(plan, scale, gradient):
    """In place, the gradient of a block's scale from that of logvar."""
    if plan.form == CLAMPED:
        dtype = gradient.dtype.type
        zero_outside(scale, dtype(plan.low), dtype(plan.high), gradient)
