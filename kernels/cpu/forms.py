"""CPU code: forms of a scale, the twin of ``forms`` (what one is, is said there).

A number chooses a pass over a block: nothing is asked in its loop, and one compiled kernel serves
all forms.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload

from .. import coefficients
from .gaussian import exp_terms
from .numeric import INLINE, JIT, as_f32, as_i32, f32, horner, i32

LOGVAR, LOG_STD, STD, VAR = range(4)
FORMS = {"logvar": LOGVAR, "log_std": LOG_STD, "std": STD, "var": VAR}

LN_F32 = tuple(map(f32, coefficients.LN_F32))
LN_F64_LESS_FIRST = coefficients.LN_F64[:-1]
SQRT_HALF, SQRT_TWO = math.sqrt(0.5), math.sqrt(2.0)
SQRT_HALF_BITS = i32(0x3F3504F3)
LN2_HIGH, LN2_LOW = f32(0.693359375), f32(-2.12194440e-4)
TINIEST, LIFT = f32(2.0**-126), f32(2.0**24)  # of the normal numbers
NEAR_LOW, NEAR_HIGH = f32(SQRT_HALF), f32(SQRT_TWO)
HALF, ONE = f32(0.5), f32(1.0)


class Terms(NamedTuple):
    """Of a block whose scale is no logarithm; logvar within its bounds."""

    logvar: types.Array
    std: types.Array
    expm1: types.Array  # e^logvar - 1
    phi: types.Array


@njit(**INLINE)
def log_terms_f32(x):
    """log(x), and x - 1 - log(x) without cancellation near 1."""
    normal = x * LIFT if x < TINIEST else x
    bits = as_i32(normal)
    k = i32(bits - SQRT_HALF_BITS) >> 23
    y = as_f32(i32(bits - (k << 23))) - ONE
    psi = y * y * (HALF - y * horner(y, LN_F32))
    n = f32(i32(k - 24)) if x < TINIEST else f32(i32(k))
    log = n * LN2_HIGH + (n * LN2_LOW + (y - psi))
    log = log if x > f32(0.0) else (f32(-np.inf) if x == f32(0.0) else f32(np.nan))
    log = x if x == f32(np.inf) else log
    return log, psi if (x > NEAR_LOW) & (x < NEAR_HIGH) else x - ONE - log


@njit(**INLINE)
def log_terms_f64(x):
    """The same."""
    y = x - 1.0
    s = y / (x + 1.0)
    psi = s * s * (2.0 / (1.0 - s) - s * horner(s * s, LN_F64_LESS_FIRST))
    near = (x > SQRT_HALF) & (x < SQRT_TWO)
    log = y - psi if near else math.log(x)
    return log, psi if near else y - log


def log_terms(x):
    """log(x) and x - 1 - log(x) in the precision of x."""
    raise NotImplementedError("compiled code only")


@overload(log_terms, jit_options=INLINE)
def _log_terms(x):
    if x == types.float32:
        return lambda x: log_terms_f32(x)
    return lambda x: log_terms_f64(x)


@njit(**JIT)
def is_direct(plan):
    """Is the scale no logarithm?"""
    return plan.form >= STD


@njit(**JIT)
def has_bounds(plan):
    """Is logvar bounded?"""
    return (plan.low > -np.inf) | (plan.high < np.inf)


@njit(**JIT)
def multiply(values, factor, out):
    """By a number."""
    for i in range(len(values)):
        out[i] = factor * values[i]


@njit(**JIT)
def clamp(values, low, high, out):
    """torch.clamp: NaN passes."""
    for i in range(len(values)):
        value = values[i]
        value = low if value < low else value
        out[i] = high if value > high else value


@njit(**JIT)
def zero_outside(logvar, low, high, gradient):
    """The gradient of clamp: 0 at its bounds, too; an infinite one is none."""
    zero = gradient.dtype.type(0)
    open_low, open_high = low == -np.inf, high == np.inf
    for i in range(len(logvar)):
        inside = ((logvar[i] > low) | open_low) & ((logvar[i] < high) | open_high)
        gradient[i] = gradient[i] if inside else zero


@njit(**JIT)
def logvar_of(plan, scale, out):
    """logvar of a block whose scale is a logarithm: the scale itself, or in out."""
    dtype, logvar = out.dtype.type, scale
    if plan.form == LOG_STD:
        multiply(scale, dtype(2), out)
        logvar = out
    if has_bounds(plan):
        clamp(logvar, dtype(plan.low), dtype(plan.high), out)
        logvar = out
    return logvar


@njit(**JIT)
def of_std(scale, terms):
    """Of a standard deviation."""
    one, two = scale.dtype.type(1), scale.dtype.type(2)
    for i in range(len(scale)):
        log, psi = log_terms(scale[i])
        far = scale[i] - one
        terms.logvar[i] = two * log
        terms.std[i] = scale[i]
        terms.expm1[i] = far * (scale[i] + one)
        terms.phi[i] = far * far + two * psi


@njit(**JIT)
def of_var(scale, terms):
    """Of a variance."""
    one = scale.dtype.type(1)
    for i in range(len(scale)):
        terms.logvar[i], terms.phi[i] = log_terms(scale[i])
        terms.std[i] = math.sqrt(scale[i])
        terms.expm1[i] = scale[i] - one


@njit(**JIT)
def keep_within(low, high, terms):
    """Those of a bound where logvar is beyond it."""
    for i in range(len(terms.logvar)):
        logvar = terms.logvar[i]
        bound = low if logvar < low else logvar
        bound = high if bound > high else bound
        if bound != logvar:
            terms.logvar[i] = bound
            terms.std[i], terms.expm1[i], terms.phi[i] = exp_terms(bound)


@njit(**JIT)
def direct_terms(plan, scale, terms):
    """Fill the terms of a block whose scale is no logarithm."""
    if plan.form == STD:
        of_std(scale, terms)
    else:
        of_var(scale, terms)
    if has_bounds(plan):
        dtype = scale.dtype.type
        keep_within(dtype(plan.low), dtype(plan.high), terms)


@njit(**JIT)
def slopes(plan, scale, std, std_slope, of_logvar):
    """What 2 eps dz, and the gradient of logvar, are multiplied by for that of the scale."""
    one, two = scale.dtype.type(1), scale.dtype.type(2)
    if plan.form == STD:
        for i in range(len(scale)):
            std_slope[i], of_logvar[i] = two, two / scale[i]
    else:
        for i in range(len(scale)):
            std_slope[i], of_logvar[i] = one / std[i], one / scale[i]


@njit(**JIT)
def to_gradient_of_scale(plan, logvar, gradient):
    """In place, the gradient of a block's scale: of a logarithm from that of logvar, and 0 where
    logvar is at a bound.
    """
    dtype = gradient.dtype.type
    if plan.form == LOG_STD:
        multiply(gradient, dtype(2), gradient)
    if has_bounds(plan):
        zero_outside(logvar, dtype(plan.low), dtype(plan.high), gradient)
