"""Device code: the forms of a scale. A form says how the tensor beside mu gives logvar.

``logvar(b_scale, m, lo, hi)``: logvar of a block. Outside of the mask m it is 0, so that nothing is
added to sums; None where that does not matter.

``gradient(b_dlogvar, b_scale, lo, hi)``: the gradient of the scale from that of logvar. Where there
is none it is 0, whatever came in.

lo and hi are bounds on logvar, read by forms that have any. A kernel takes each function as a
constexpr of its own: from within a tuple, Triton's cache would not see that one has changed.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def same(b_scale, m, lo, hi):
    """The scale is logvar."""
    return b_scale


@triton.jit
def gradient_of_same(b_dlogvar, b_scale, lo, hi):
    return b_dlogvar


@triton.jit
def clamped(b_scale, m, lo, hi):
    """The scale is logvar before torch.clamp: NaN passes."""
    b_lo = tl.full([], lo, b_scale.dtype)
    b_hi = tl.full([], hi, b_scale.dtype)
    b_logvar = tl.clamp(b_scale, b_lo, b_hi, propagate_nan=tl.PropagateNan.ALL)
    if m is not None:
        b_logvar = tl.where(m, b_logvar, 0.0)
    return b_logvar


@triton.jit
def gradient_of_clamped(b_dlogvar, b_scale, lo, hi):
    """Between the bounds, of which an infinite one is none; 0 at them, too."""
    b_lo = tl.full(b_scale.shape, lo, b_scale.dtype)
    b_hi = tl.full(b_scale.shape, hi, b_scale.dtype)
    m_above = (b_scale > b_lo) | (b_lo == float("-inf"))
    m_below = (b_scale < b_hi) | (b_hi == float("inf"))
    return tl.where(m_above & m_below, b_dlogvar, 0.0)


class Form(NamedTuple):
    """Device functions."""

    logvar: Any
    gradient: Any


FORMS = {
    "logvar": Form(same, gradient_of_same),
    "clamped": Form(clamped, gradient_of_clamped),
}
