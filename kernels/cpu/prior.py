"""CPU code: a prior other than N(0, I), the twin of ``prior``.

The KL of N(mu, e^logvar) to N(m, e^l) is that of N(far, e^r) to N(0, 1) with

    far = (mu - m) e^(-l/2)    r = logvar - l

Both differences are taken before anything else: near the prior they are exact, and phi(r) keeps
its digits. Of a scale s that is no logarithm, u = (s - s') / s' is such a difference.

All of this is compiled once there is a prior, never for N(0, I): the kernels that both share get
None in place of a ``Prior``, and numba drops what stands under a test for it.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload

from .forms import (
    LN_F64_LESS_FIRST,
    LOG_STD,
    SQRT_HALF,
    SQRT_TWO,
    STD,
    direct_terms,
    has_bounds,
    is_direct,
    log_terms,
    multiply,
)
from .gaussian import exp_terms
from .memory import block
from .numeric import INLINE, JIT, f32, horner
from .plan import NONE, Operand
from .reduction import copy, repeat
from .tile import Place, source

LN_F32_LESS_FIRST = tuple(map(f32, LN_F64_LESS_FIRST))
THIRD, ONE, TWO, THREE = f32(1 / 3), f32(1.0), f32(2.0), f32(3.0)
MOST = f32(64.0)  # |r| of which e^r is finite
PRIOR_BLOCKS = 4  # of a worker's memory, while there is a prior
MEAN, SCALE, LOGVAR, ROOT = range(PRIOR_BLOCKS)


class Prior(NamedTuple):
    """Its tensors, or their gradients; address 0: not wanted."""

    mean: Operand
    scale: Operand


class PriorBlock(NamedTuple):
    """Of a block of elements."""

    mean: types.Array
    scale: types.Array
    logvar: types.Array  # filled where something reads it
    root: types.Array  # exp(-logvar / 2)


@njit(**INLINE)
def psi_f32(u, x):
    """u - log(x) of x = 1 + u, without cancellation near u = 0.

    The series goes on until psi is large beside the rounding of x, which is a quotient.
    """
    s = u / (u + TWO)
    near = s * (u - s * s * horner(s * s, LN_F32_LESS_FIRST))
    return near if (x > THIRD) & (x < THREE) else u - log_terms(x)[0]


@njit(**INLINE)
def psi_f64(u, x):
    """The same; the series has all digits nearer to 0."""
    s = u / (u + 2.0)
    near = s * (u - s * s * horner(s * s, LN_F64_LESS_FIRST))
    return near if (x > SQRT_HALF) & (x < SQRT_TWO) else u - math.log(x)


def psi(u, x):
    """u - log(x) of x = 1 + u, in the precision of both."""
    raise NotImplementedError("compiled code only")


@overload(psi, jit_options=INLINE)
def _psi(u, x):
    if u == types.float32:
        return lambda u, x: psi_f32(u, x)
    return lambda u, x: psi_f64(u, x)


@njit(**JIT)
def of_logarithm(logvar, root):
    """exp(-logvar / 2)."""
    for i in range(len(logvar)):
        root[i] = exp_terms(-logvar[i])[0]


@njit(**JIT)
def of_direct(plan, scale, root):
    """The same, of a scale that is no logarithm; NaN of one that has none."""
    dtype = scale.dtype.type
    zero, one, nan = dtype(0), dtype(1), dtype(np.nan)
    if plan.form == STD:
        for i in range(len(scale)):
            root[i] = nan if scale[i] < zero else one / scale[i]
    else:
        for i in range(len(scale)):
            root[i] = one / math.sqrt(scale[i])


@njit(**JIT)
def logs(plan, scale, out):
    """logvar of a scale that is no logarithm."""
    factor = scale.dtype.type(2 if plan.form == STD else 1)
    for i in range(len(scale)):
        out[i] = factor * log_terms(scale[i])[0]


@njit(**JIT)
def prior_at(plan, prior, place, memory):
    """The prior of a block of elements; `memory` has PRIOR_BLOCKS."""
    n = place.rows * place.cols
    mean = source(prior.mean, place, block(memory, MEAN, n))
    scale = source(prior.scale, place, block(memory, SCALE, n))
    logvar, root = block(memory, LOGVAR, n), block(memory, ROOT, n)
    if is_direct(plan):
        of_direct(plan, scale, root)
        if has_bounds(plan) or plan.mean_over != NONE:
            logs(plan, scale, logvar)
        return PriorBlock(mean, scale, logvar, root)
    if plan.form == LOG_STD:
        multiply(scale, scale.dtype.type(2), logvar)
    else:
        logvar = scale
    of_logarithm(logvar, root)
    return PriorBlock(mean, scale, logvar, root)


@njit(**JIT)
def varies(prior):
    """Do the samples have one each?"""
    return (prior.mean.row != 0) | (prior.scale.row != 0)


@njit(**JIT)
def prior_of_first(plan, prior, piece, memory):
    """The prior of a piece's first block: of all its blocks, if it does not vary."""
    rows = piece.block_rows if varies(prior) else 1
    place = Place(piece.first_row, rows, piece.col, piece.cols, plan.event, plan.inner)
    found, n = prior_at(plan, prior, place, memory), piece.block_rows * piece.cols
    if rows == piece.block_rows:
        return found
    return PriorBlock(
        repeat(found.mean, block(memory, MEAN, n)),
        repeat(found.scale, block(memory, SCALE, n)),
        repeat(found.logvar, block(memory, LOGVAR, n)),
        repeat(found.root, block(memory, ROOT, n)),
    )


@njit(**JIT)
def distances(prior, mu, far):
    """(mu - m) e^(-l/2), of which the square does not overflow before it has to."""
    for i in range(len(mu)):
        far[i] = (mu[i] - prior.mean[i]) * prior.root[i]


@njit(**INLINE)
def r_terms(logvar, of_prior):
    """e^r - 1 and phi(r).

    What r has lost to rounding, where it is large, is much to e^r: it is added to first order.
    """
    r = logvar - of_prior
    high = r + of_prior
    lost = (logvar - high) - (of_prior - (high - r))
    _, expm1, phi = exp_terms(r)
    within = abs(r) < MOST
    return expm1 + lost * (expm1 + ONE) if within else expm1, phi + lost * expm1 if within else phi


@njit(**JIT)
def ratios(scale, of_prior, u, x):
    """u = (s - s') / s' and x = 1 + u; NaN where the prior has no logarithm."""
    dtype = scale.dtype.type
    zero, one, nan, infinite = dtype(0), dtype(1), dtype(np.nan), dtype(np.inf)
    for i in range(len(scale)):
        at = nan if of_prior[i] < zero else of_prior[i]
        x[i] = scale[i] / at
        u[i] = x[i] - one if at == infinite else (scale[i] - at) / at


@njit(**JIT)
def expm1_of_ratios(plan, u):
    """In place of u, e^r - 1."""
    two = u.dtype.type(2)
    if plan.form == STD:
        for i in range(len(u)):
            u[i] = u[i] * (u[i] + two)


@njit(**JIT)
def phi_of_ratios(plan, u, x):
    """In place of x, phi(r)."""
    two = u.dtype.type(2)
    if plan.form == STD:
        for i in range(len(u)):
            x[i] = u[i] * u[i] + two * psi(u[i], x[i])
    else:
        for i in range(len(u)):
            x[i] = psi(u[i], x[i])


@njit(**JIT)
def at_bounds(plan, prior, terms):
    """Of logvar itself where that is at a bound."""
    dtype = terms.logvar.dtype.type
    low, high = dtype(plan.low), dtype(plan.high)
    for i in range(len(terms.logvar)):
        if (terms.logvar[i] <= low) | (terms.logvar[i] >= high):
            _, terms.expm1[i], terms.phi[i] = exp_terms(terms.logvar[i] - prior.logvar[i])


@njit(**JIT)
def own_terms(plan, scale, terms):
    """Std of a scale that is no logarithm; with bounds logvar, and its terms to N(0, 1), too."""
    if has_bounds(plan):
        direct_terms(plan, scale, terms)
    elif plan.form == STD:
        copy(scale, terms.std)
    else:
        for i in range(len(scale)):
            terms.std[i] = math.sqrt(scale[i])


@njit(**JIT)
def phi_to(plan, scale, prior, terms):
    """Std, phi(r), and logvar where means read it, of a scale that is no logarithm."""
    own_terms(plan, scale, terms)
    ratios(scale, prior.scale, terms.expm1, terms.phi)
    phi_of_ratios(plan, terms.expm1, terms.phi)
    if has_bounds(plan):
        at_bounds(plan, prior, terms)
    elif plan.mean_over != NONE:
        logs(plan, scale, terms.logvar)


@njit(**JIT)
def expm1_to(plan, scale, prior, terms):
    """Std and e^r - 1 of a scale that is no logarithm; phi is overwritten."""
    own_terms(plan, scale, terms)
    ratios(scale, prior.scale, terms.expm1, terms.phi)
    expm1_of_ratios(plan, terms.expm1)
    if has_bounds(plan):
        at_bounds(plan, prior, terms)


@njit(**JIT)
def to_gradient_of_prior_scale(plan, root, gradient):
    """In place, from that of logvar."""
    two = gradient.dtype.type(2)
    if plan.form == LOG_STD:
        multiply(gradient, two, gradient)
    elif plan.form == STD:
        for i in range(len(root)):
            gradient[i] *= two * root[i]
    elif is_direct(plan):
        for i in range(len(root)):
            gradient[i] *= root[i] * root[i]
