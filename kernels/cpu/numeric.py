"""CPU code: what all of it is written in: numba's options, types, bits of floats, polynomials."""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

#: Only contraction (FMA) is allowed of fast math: rounding by a magic number must not be simplified
#: away.
KERNEL = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
JIT = {**KERNEL, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # for compiled code alone
INLINE = {**JIT, "forceinline": True}  # a call inside of a loop would keep it from being vectorised
f32, i32, u32, i64, u64 = np.float32, np.int32, np.uint32, np.int64, np.uint64


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


@intrinsic
def as_i64(typingctx, x):
    """The bits of a float64."""
    return types.int64(types.float64), lambda c, builder, s, args: builder.bitcast(
        args[0], ir.IntType(64)
    )


@intrinsic
def as_f64(typingctx, x):
    """The float64 of these bits."""
    return types.float64(types.int64), lambda c, builder, s, args: builder.bitcast(
        args[0], ir.DoubleType()
    )


@njit(**INLINE)
def horner(x, coefficients):
    """The polynomial, from the highest power down."""
    value = coefficients[0]
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value
