"""CPU code: the terms of one element, the twin of ``gaussian`` (the formulas are derived there).

Called in loops over short arrays that LLVM turns into vector instructions.
"""

from numba import njit, types
from numba.extending import overload

from .. import coefficients
from .numeric import INLINE, as_f32, as_f64, as_i32, as_i64, f32, horner, i32

EXP_F32 = tuple(map(f32, coefficients.EXP_F32))
EXP_F64 = coefficients.EXP_F64
HALF, ONE, TWO = f32(0.5), f32(1.0), f32(2.0)
LOWEST = f32(-176.0)
HALF_LOG2_E = f32(0.7213475204444817)
TWO_LN2_HIGH = f32(1.38629150390625)  # 15 bits of 2 ln 2: n times it is exact
TWO_LN2_LOW = f32(2.8572136406188347e-06)
ROUND = f32(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, held in the low bits
ROUND_127 = f32(12583039.0)
LOWEST_F64 = -1418.0
TWO_LN2_HIGH_F64 = 1.3862943607382476  # 33 bits, as in fdlibm
TWO_LN2_LOW_F64 = 3.816429858541175e-10
ROUND_F64 = 1.5 * 2.0**52
ROUND_1023_F64 = ROUND_F64 + 1023.0


@njit(**INLINE)
def exp_terms_f32(logvar):
    """exp(logvar / 2), exp(logvar) - 1, phi(logvar)."""
    a, b, c, d, e, f = EXP_F32
    small = abs(logvar) <= ONE
    # n stays in [-127, 127], where 2^n is 0 or a float32; past 127, r grows until all is inf.
    low = LOWEST if logvar < LOWEST else logvar
    rounded = low * HALF_LOG2_E + ROUND
    rounded = ROUND_127 if rounded > ROUND_127 else rounded
    rounded = ROUND if small else rounded
    n = rounded - ROUND
    r = (low - n * TWO_LN2_HIGH) - n * TWO_LN2_LOW
    psi = r * r * (((((a * r + b) * r + c) * r + d) * r + e) * r + f)
    q = r * HALF + psi
    q2 = q * q
    w = q * TWO + q2
    scale = as_f32(i32((as_i32(rounded) << 23) + (127 << 23)))
    expm1 = scale * (scale * w + scale) - ONE
    phi = psi * TWO + q2 if small else expm1 - logvar
    return scale * q + scale, w if small else expm1, phi


@njit(**INLINE)
def exp_terms_f64(logvar):
    """The same steps, longer."""
    small = abs(logvar) <= 1.0
    low = LOWEST_F64 if logvar < LOWEST_F64 else logvar
    rounded = low * 0.7213475204444817 + ROUND_F64
    rounded = ROUND_1023_F64 if rounded > ROUND_1023_F64 else rounded
    rounded = ROUND_F64 if small else rounded
    n = rounded - ROUND_F64
    r = (low - n * TWO_LN2_HIGH_F64) - n * TWO_LN2_LOW_F64
    psi = r * r * horner(r, EXP_F64)
    q = r * 0.5 + psi
    q2 = q * q
    w = q * 2.0 + q2
    scale = as_f64((as_i64(rounded) << 52) + (1023 << 52))
    expm1 = scale * (scale * w + scale) - 1.0
    phi = psi * 2.0 + q2 if small else expm1 - logvar
    return scale * q + scale, w if small else expm1, phi


def exp_terms(logvar):
    """exp(logvar / 2), exp(logvar) - 1, phi(logvar) in the precision of logvar."""
    raise NotImplementedError("compiled code only")


@overload(exp_terms, jit_options=INLINE)
def _exp_terms(logvar):
    if logvar == types.float32:
        return lambda logvar: exp_terms_f32(logvar)
    return lambda logvar: exp_terms_f64(logvar)
