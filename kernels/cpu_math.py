"""CPU code: the arithmetic of a block, in loops that LLVM turns into vector instructions.

The twins of ``gaussian`` and ``philox`` (the formulas are derived there), compiled by numba. A
block is a handful of short arrays; every function here is one pass over them. Only contraction
(FMA) is allowed of fast math: rounding by a magic number must not be simplified away.
"""

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from . import coefficients

JIT = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
f32, i32, u32, u64 = np.float32, np.int32, np.uint32, np.uint64

EXP_F32 = tuple(map(f32, coefficients.EXP_F32))
PHI_F64 = coefficients.PHI_F64
HALF, ONE, TWO = f32(0.5), f32(1.0), f32(2.0)
LOWEST = f32(-176.0)
HALF_LOG2_E = f32(0.7213475204444817)
TWO_LN2_HIGH = f32(1.38629150390625)  # 15 bits of 2 ln 2: n times it is exact
TWO_LN2_LOW = f32(2.8572136406188347e-06)
ROUND = f32(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, held in the low bits
ROUND_127 = f32(12583039.0)


@intrinsic
def as_i32(typingctx, x):
    """The bits of a float32."""
    return types.int32(types.float32), lambda c, builder, s, args: builder.bitcast(
        args[0], ir.IntType(32)
    )


@intrinsic
def as_f32(typingctx, x):
    """The float32 of these bits."""
    return types.float32(types.int32), lambda c, builder, s, args: builder.bitcast(
        args[0], ir.FloatType()
    )


@njit(**JIT)
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


@njit(**JIT)
def exp_terms_f64(logvar):
    """exp(logvar / 2), exp(logvar) - 1, phi(logvar)."""
    small = abs(logvar) <= 1.0
    std = math.exp(0.5 * logvar)
    phi = 0.0
    for coefficient in PHI_F64:
        phi = phi * logvar + coefficient
    phi *= logvar * logvar
    expm1 = logvar + phi if small else std * std - 1.0
    return std, expm1, phi if small else expm1 - logvar


def exp_terms(logvar):
    """exp(logvar / 2), exp(logvar) - 1, phi(logvar) in the precision of logvar."""
    raise NotImplementedError("compiled code only")


@overload(exp_terms, jit_options=JIT)
def _exp_terms(logvar):
    if logvar == types.float32:
        return lambda logvar: exp_terms_f32(logvar)
    return lambda logvar: exp_terms_f64(logvar)
