"""CPU code: the dtypes that elements are stored as, and those that they are computed in."""

import numpy as np
from numba import njit, types
from numba.extending import overload

from .numeric import JIT, as_f32, as_i32, f32, i32

F32, F64, BF16, F16 = range(4)  # kinds of storage


@njit(**JIT)
def bf16_to_f32(bits):
    return as_f32(i32(i32(bits) << 16))


@njit(**JIT)
def f32_to_bf16(value):
    bits = as_i32(value)
    rounded = i32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest even
    return np.int16(0x7FC0 if value != value else rounded)


@njit(**JIT)
def f16_to_f32(bits):
    size = i32(i32(bits) & 0x7FFF)
    # Subnormals as steps above 2^-14: as subnormals of float32 they take some machines long.
    normal = as_f32(i32((size << 13) + (112 << 23)))
    subnormal = as_f32(i32((size << 13) + (113 << 23))) - f32(2.0**-14)
    special = as_f32(i32((size << 13) | 0x7F800000))  # inf and NaN
    magnitude = subnormal if size < 0x400 else normal
    magnitude = special if size >= 0x7C00 else magnitude
    return as_f32(i32(as_i32(magnitude) | i32((i32(bits) & 0x8000) << 16)))


@njit(**JIT)
def f32_to_f16(value):
    bits = as_i32(value)
    size = i32(bits & 0x7FFFFFFF)
    # To nearest even: normal results by integers, subnormal ones by an addition that aligns them.
    normal = i32(size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13
    subnormal = i32(as_i32(as_f32(size) + f32(0.5)) - 0x3F000000)
    half = subnormal if size < 0x38800000 else normal
    half = 0x7C00 if size >= 0x477FF000 else half
    half = 0x7E00 if size > 0x7F800000 else half
    return np.uint16(half | ((bits >> 16) & 0x8000))


def widen(raw):
    """An element as it is stored (bfloat16: int16, float16: uint16) as a float."""
    raise NotImplementedError("compiled code only")


@overload(widen, jit_options=JIT)
def _widen(raw):
    if raw == types.int16:
        return lambda raw: bf16_to_f32(raw)
    if raw == types.uint16:
        return lambda raw: f16_to_f32(raw)
    return lambda raw: raw


def narrow(value, like):
    """A float rounded to what `like` is stored as."""
    raise NotImplementedError("compiled code only")


@overload(narrow, jit_options=JIT)
def _narrow(value, like):
    if like == types.int16:
        return lambda value, like: f32_to_bf16(f32(value))
    if like == types.uint16:
        return lambda value, like: f32_to_f16(f32(value))
    if like == types.float32:
        return lambda value, like: f32(value)
    return lambda value, like: float(value)
