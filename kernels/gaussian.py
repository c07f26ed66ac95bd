"""Device code: exp(logvar / 2), exp(logvar) - 1 and phi(logvar) = exp(logvar) - 1 - logvar.

KL(N(m, e^l) || N(0, 1)) = (m^2 + phi(l)) / 2 (Kingma & Welling 2013, appendix B). Written as
``exp(l) - 1 - l`` phi loses every digit as l -> 0, which is where a collapsing posterior lives.

float32: with l = 2 n ln 2 + r, n = 0 for |l| <= 1, psi = e^(r/2) - 1 - r/2 = r^2 P(r) and
q = e^(r/2) - 1 = r/2 + psi,

    e^(l/2) = 2^n (1 + q)      e^l = 4^n (1 + w)      w = e^r - 1 = q^2 + 2 q
    phi(l)  = q^2 + 2 psi      e^l - 1 = w            n = 0: only like signs add up
    phi(l)  = e^l - 1 - l                             else: this loses no more than two bits

One polynomial serves all three, in the same operations on every device. float64 takes the same
split at |l| = 1, with a series for phi and the library's exp beyond it.
"""

import triton
import triton.language as tl

from . import coefficients

EXP_F32 = tl.constexpr(coefficients.EXP_F32)
PHI_F64 = tl.constexpr(coefficients.PHI_F64)

HALF_LOG2_E = tl.constexpr(0.7213475204444817)
TWO_LN2_HIGH = tl.constexpr(1.38629150390625)  # 15 bits of 2 ln 2: n times it is exact
TWO_LN2_LOW = tl.constexpr(2.8572136406188347e-06)
# 1.5 * 2^23: adding it to x rounds x to an integer n, which the low bits of the sum then hold.
ROUND = tl.constexpr(12582912.0)
ROUND_127 = tl.constexpr(12583039.0)


@triton.constexpr_function
def length(values):
    return len(values)


@triton.jit
def polynomial(b_x, VALUES: tl.constexpr):
    """Horner; VALUES from the highest power down."""
    b_y = tl.full(b_x.shape, VALUES[0], b_x.dtype)
    for i in tl.static_range(1, length(VALUES)):
        b_y = b_y * b_x + VALUES[i]
    return b_y


@triton.jit
def divide(b_x, b_y):
    """x / y, rounded correctly: in float32 `/` alone may be off by 2 ulp, half of a KL's budget."""
    if b_x.dtype == tl.float64:
        return b_x / b_y
    else:
        return tl.div_rn(b_x, b_y)


@triton.jit
def exp_terms(b_logvar, b_low=None):
    """exp(logvar / 2), exp(logvar) - 1, phi(logvar); what is not used costs nothing.

    b_low: what rounding has taken from logvar, or None.
    """
    if b_logvar.dtype == tl.float64:
        return _exp_terms_f64(b_logvar)
    else:
        return _exp_terms_f32(b_logvar, b_low)


@triton.jit
def difference(b_x, b_y):
    """x - y, and what rounding has taken from it (Knuth's two-sum): of logarithms some 10 apart, as
    much as a KL's budget. (Not taken in float64.)
    """
    b_difference = b_x - b_y
    if b_x.dtype == tl.float64:
        b_low = tl.zeros_like(b_difference)
    else:
        b_near = b_difference + b_y
        b_low = (b_x - b_near) - (b_y - (b_near - b_difference))
        b_low = tl.where(b_low == b_low, b_low, 0.0)  # of infinities
    return b_difference, b_low


@triton.jit
def _exp_terms_f32(b_logvar, b_low_part):
    m_small = tl.abs(b_logvar) <= 1.0
    # n stays in [-127, 127], where 2^n is 0 or a float32; past 127, r grows until all is inf.
    b_low = tl.maximum(b_logvar, -176.0, propagate_nan=tl.PropagateNan.ALL)
    b_round = tl.minimum(b_low * HALF_LOG2_E + ROUND, ROUND_127)
    b_round = tl.where(m_small, ROUND, b_round)
    b_n = b_round - ROUND
    b_r = b_low - b_n * TWO_LN2_HIGH
    b_r = b_r - b_n * TWO_LN2_LOW
    if b_low_part is not None:
        b_r += b_low_part
    b_psi = b_r * b_r * polynomial(b_r, EXP_F32)
    b_q = b_r * 0.5 + b_psi
    b_q2 = b_q * b_q
    b_w = b_q * 2.0 + b_q2
    b_scale = ((b_round.to(tl.int32, bitcast=True) << 23) + (127 << 23)).to(
        tl.float32, bitcast=True
    )
    b_std = b_scale * b_q + b_scale
    b_expm1 = b_scale * (b_scale * b_w + b_scale) - 1.0
    b_phi = tl.where(m_small, b_psi * 2.0 + b_q2, b_expm1 - b_logvar)
    return b_std, tl.where(m_small, b_w, b_expm1), b_phi


@triton.jit
def _exp_terms_f64(b_logvar):
    m_small = tl.abs(b_logvar) <= 1.0
    b_exp = tl.exp(b_logvar)
    b_phi_small = b_logvar * b_logvar * polynomial(b_logvar, PHI_F64)
    b_expm1 = tl.where(m_small, b_logvar + b_phi_small, b_exp - 1.0)
    b_phi = tl.where(m_small, b_phi_small, b_expm1 - b_logvar)
    return tl.exp(0.5 * b_logvar), b_expm1, b_phi


@triton.jit
def expm1(b_logvar, b_low=None):
    """exp(logvar) - 1."""
    _, b_expm1, _ = exp_terms(b_logvar, b_low)
    return b_expm1


@triton.jit
def kl_terms(b_mu, b_logvar, b_low=None):
    """Twice the KL of each element."""
    _, _, b_phi = exp_terms(b_logvar, b_low)
    return b_mu * b_mu + b_phi
