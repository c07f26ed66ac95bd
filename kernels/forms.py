"""Device code: the forms of a scale. A form says what the tensor beside mu is.

``idle``: the scale of N(0, 1), of which logvar is 0: what lanes without an element have.
``logvar(b_scale)``: logvar of a block.

``terms(b_scale, b_prior, m, lo, hi, CLAMP)``: logvar within [lo, hi] if CLAMP, exp(logvar / 2),
exp(r) - 1 and phi(r), r = logvar less that of a prior's scale b_prior, None for N(0, 1); what is
not used costs nothing. Outside of the mask m logvar is 0 all the same, so that nothing is added to
sums; None where that does not matter. Two standard deviations or variances near each other have
their phi from u = (scale - prior) / prior: the logarithms' difference would have lost digits.

``root(b_prior)``: exp(-logvar / 2).
``of_std(b_std)``: what 2 eps dz is multiplied by for the gradient of the scale.
``of_logvar(b_values, b_root)``: the values times dlogvar / dscale; b_root = exp(-logvar / 2).

A kernel takes each function as a constexpr of its own: from within a tuple, Triton's cache would
not see that one has changed.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import coefficients
from .gaussian import difference, divide, exp_terms, polynomial

LN_F32 = tl.constexpr(coefficients.LN_F32)
LN_F64_LESS_FIRST = tl.constexpr(coefficients.LN_F64[:-1])
SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_TWO = tl.constexpr(1.4142135623730951)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
LN2_HIGH = tl.constexpr(0.693359375)  # 9 bits: an exponent times it is exact
LN2_LOW = tl.constexpr(-2.12194440e-4)
TINIEST = tl.constexpr(2.0**-126)  # of the normal numbers


@triton.jit
def clamped(b_logvar, m, lo, hi):
    """torch.clamp: NaN passes."""
    b_lo = tl.full([], lo, b_logvar.dtype)
    b_hi = tl.full([], hi, b_logvar.dtype)
    b_logvar = tl.clamp(b_logvar, b_lo, b_hi, propagate_nan=tl.PropagateNan.ALL)
    if m is not None:
        b_logvar = tl.where(m, b_logvar, 0.0)
    return b_logvar


@triton.jit
def inside(b_logvar, lo, hi):
    """Where clamp has a gradient: between the bounds, of which an infinite one is none."""
    b_lo = tl.full(b_logvar.shape, lo, b_logvar.dtype)
    b_hi = tl.full(b_logvar.shape, hi, b_logvar.dtype)
    m_above = (b_logvar > b_lo) | (b_lo == float("-inf"))
    m_below = (b_logvar < b_hi) | (b_hi == float("inf"))
    return m_above & m_below


@triton.jit
def same(b_scale):
    """The scale is logvar."""
    return b_scale


@triton.jit
def twice(b_scale):
    """The scale is the logarithm of the standard deviation."""
    return 2.0 * b_scale


@triton.jit
def _of_logarithm(b_logvar, b_prior_logvar, m, lo, hi, CLAMP: tl.constexpr):
    if CLAMP:
        b_logvar = clamped(b_logvar, m, lo, hi)
    b_std, b_expm1, b_phi = exp_terms(b_logvar)
    if b_prior_logvar is not None:
        b_r, b_low = difference(b_logvar, b_prior_logvar)
        _, b_expm1, b_phi = exp_terms(b_r, b_low)
    return b_logvar, b_std, b_expm1, b_phi


@triton.jit
def terms_of_logvar(b_scale, b_prior, m, lo, hi, CLAMP: tl.constexpr):
    return _of_logarithm(b_scale, b_prior, m, lo, hi, CLAMP)


@triton.jit
def terms_of_log_std(b_scale, b_prior, m, lo, hi, CLAMP: tl.constexpr):
    if b_prior is not None:
        b_prior = 2.0 * b_prior
    return _of_logarithm(2.0 * b_scale, b_prior, m, lo, hi, CLAMP)


@triton.jit
def root_of_logvar(b_prior):
    b_root, _, _ = exp_terms(-b_prior)
    return b_root


@triton.jit
def root_of_log_std(b_prior):
    return root_of_logvar(2.0 * b_prior)


@triton.jit
def _psi(b_u):
    """u - log(1 + u) for 1/sqrt(2) < 1 + u < sqrt(2), of its own digits."""
    if b_u.dtype == tl.float64:
        b_s = b_u / (b_u + 2.0)
        b_s2 = b_s * b_s
        return b_s2 * (2.0 / (1.0 - b_s) - b_s * polynomial(b_s2, LN_F64_LESS_FIRST))
    else:
        return b_u * b_u * (0.5 - b_u * polynomial(b_u, LN_F32))


@triton.jit
def _log_f32(b_x):
    """log(x), and where 1/sqrt(2) < x < sqrt(2) also x - 1 - log(x), else 0."""
    m_tiny = b_x < TINIEST
    b_normal = tl.where(m_tiny, b_x * 16777216.0, b_x)
    b_bits = b_normal.to(tl.int32, bitcast=True)
    b_k = (b_bits - SQRT_HALF_BITS) >> 23
    b_y = (b_bits - (b_k << 23)).to(tl.float32, bitcast=True) - 1.0
    b_psi = _psi(b_y)
    b_n = tl.where(m_tiny, b_k - 24, b_k).to(tl.float32)
    b_log = b_n * LN2_HIGH + (b_n * LN2_LOW + (b_y - b_psi))
    return b_log, b_psi


@triton.jit
def _log_f64(b_x):
    b_y = b_x - 1.0
    b_psi = _psi(b_y)
    m_near = (b_x > SQRT_HALF) & (b_x < SQRT_TWO)
    return tl.where(m_near, b_y - b_psi, tl.log(b_x)), b_psi


@triton.jit
def log_terms(b_x):
    """log(x), and x - 1 - log(x) without cancellation near 1."""
    if b_x.dtype == tl.float64:
        b_log, b_psi = _log_f64(b_x)
    else:
        b_log, b_psi = _log_f32(b_x)
    b_log = tl.where(b_x > 0.0, b_log, tl.where(b_x == 0.0, float("-inf"), float("nan")))
    b_log = tl.where(b_x == float("inf"), b_x, b_log)
    m_near = (b_x > SQRT_HALF) & (b_x < SQRT_TWO)
    return b_log, tl.where(m_near, b_psi, b_x - 1.0 - b_log)


@triton.jit
def _positive(b_prior):
    """Or NaN: the quotient of two that are negative has a logarithm."""
    return tl.where(b_prior < 0.0, float("nan"), b_prior)


@triton.jit
def ratio_terms(b_scale, b_prior):
    """u = (scale - prior) / prior, and psi = u - log(1 + u) without cancellation near 0.

    In float32 the series goes on until psi is large beside the rounding of the quotient.
    """
    b_prior = _positive(b_prior)
    b_ratio = divide(b_scale, b_prior)
    b_u = divide(b_scale - b_prior, b_prior)
    b_u = tl.where(b_prior == float("inf"), b_ratio - 1.0, b_u)
    b_log, _ = log_terms(b_ratio)
    if b_u.dtype == tl.float64:
        b_psi = _psi(b_u)
        m_near = (b_ratio > SQRT_HALF) & (b_ratio < SQRT_TWO)
    else:
        b_s = divide(b_u, b_u + 2.0)
        b_s2 = b_s * b_s
        b_psi = b_s * (b_u - b_s2 * polynomial(b_s2, LN_F64_LESS_FIRST))
        m_near = (b_ratio > 0.33333334) & (b_ratio < 3.0)
    return b_u, tl.where(m_near, b_psi, b_u - b_log)


@triton.jit
def log_square(b_scale):
    """The scale is the standard deviation."""
    b_log, _ = log_terms(b_scale)
    return 2.0 * b_log


@triton.jit
def log(b_scale):
    """The scale is the variance."""
    b_log, _ = log_terms(b_scale)
    return b_log


@triton.jit
def _within(terms, b_prior_logvar, m, lo, hi, CLAMP: tl.constexpr):
    """Those of the bound where logvar is beyond it."""
    b_logvar, b_std, b_expm1, b_phi = terms
    if CLAMP:
        b_bound = clamped(b_logvar, m, lo, hi)
        m_beyond = b_bound != b_logvar
        b_std_there, b_expm1_there, b_phi_there = exp_terms(b_bound)
        if b_prior_logvar is not None:
            b_r, b_low = difference(b_bound, b_prior_logvar)
            _, b_expm1_there, b_phi_there = exp_terms(b_r, b_low)
        b_std = tl.where(m_beyond, b_std_there, b_std)
        b_expm1 = tl.where(m_beyond, b_expm1_there, b_expm1)
        b_phi = tl.where(m_beyond, b_phi_there, b_phi)
        b_logvar = b_bound
    return b_logvar, b_std, b_expm1, b_phi


@triton.jit
def terms_of_std(b_scale, b_prior, m, lo, hi, CLAMP: tl.constexpr):
    b_log, b_psi = log_terms(b_scale)
    b_prior_logvar = None
    if b_prior is None:
        b_far = b_scale - 1.0
        b_expm1 = b_far * (b_scale + 1.0)
    else:
        b_far, b_psi = ratio_terms(b_scale, b_prior)
        b_expm1 = b_far * (b_far + 2.0)
        if CLAMP:
            b_prior_logvar = log_square(b_prior)
    terms = (2.0 * b_log, b_scale, b_expm1, b_far * b_far + 2.0 * b_psi)
    return _within(terms, b_prior_logvar, m, lo, hi, CLAMP)


@triton.jit
def _sqrt(b_x):
    if b_x.dtype == tl.float64:
        b_root = tl.sqrt(b_x)
    else:
        b_root = tl.sqrt_rn(b_x)
    return b_root


@triton.jit
def terms_of_var(b_scale, b_prior, m, lo, hi, CLAMP: tl.constexpr):
    b_log, b_psi = log_terms(b_scale)
    b_std = _sqrt(b_scale)
    b_prior_logvar = None
    if b_prior is None:
        b_far = b_scale - 1.0
    else:
        b_far, b_psi = ratio_terms(b_scale, b_prior)
        if CLAMP:
            b_prior_logvar = log(b_prior)
    return _within((b_log, b_std, b_far, b_psi), b_prior_logvar, m, lo, hi, CLAMP)


@triton.jit
def std_of_logvar(b_std):
    return b_std


@triton.jit
def std_of_log_std(b_std):
    return 2.0 * b_std


@triton.jit
def std_of_std(b_std):
    return 2.0


@triton.jit
def reciprocal(b_x):
    return divide(tl.full(b_x.shape, 1.0, b_x.dtype), b_x)


@triton.jit
def root_of_std(b_prior):
    return reciprocal(_positive(b_prior))


@triton.jit
def root_of_var(b_prior):
    return reciprocal(_sqrt(b_prior))


@triton.jit
def logvar_of_logvar(b_values, b_root):
    return b_values


@triton.jit
def logvar_of_log_std(b_values, b_root):
    return 2.0 * b_values


@triton.jit
def logvar_of_std(b_values, b_root):
    return 2.0 * b_values * b_root


@triton.jit
def logvar_of_var(b_values, b_root):
    return b_values * b_root * b_root


class Form(NamedTuple):
    """A number and device functions."""

    idle: float
    logvar: Any
    root: Any
    terms: Any
    of_std: Any
    of_logvar: Any


FORMS = {
    "logvar": Form(0.0, same, root_of_logvar, terms_of_logvar, std_of_logvar, logvar_of_logvar),
    "log_std": Form(
        0.0, twice, root_of_log_std, terms_of_log_std, std_of_log_std, logvar_of_log_std
    ),
    "std": Form(1.0, log_square, root_of_std, terms_of_std, std_of_std, logvar_of_std),
    "var": Form(1.0, log, root_of_var, terms_of_var, reciprocal, logvar_of_var),
}
