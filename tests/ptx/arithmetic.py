"""What each opcode computes: a table of functions of arrays, one lane a thread.

A name that the table lacks is an error of the kernel's parse, never skipped. Modifiers (.rn, .ftz)
are part of the name, so that one which would change a result is not passed over.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import numpy as np

from .floats import (
    Array,
    Function,
    approximate,
    flush,
    fma32,
    fma64,
    from_bf16,
    larger,
    smaller,
    to_bf16,
)


class Operation(NamedTuple):
    """A function, and the types that it takes its operands and gives its result in."""

    function: Function
    sources: tuple[str, ...]
    result: str


#: The array types of PTX's types; bf16 is known by its bits, two packed float32 by theirs.
DTYPES = {
    "pred": np.bool_,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64, "f32x2": np.uint64,
}  # fmt: skip

TABLE: dict[str, Operation] = {}


def _define(name: str, function: Function, sources: str, result: str) -> None:
    TABLE[name] = Operation(function, tuple(sources.split()), result)


# Integers and bits


def _high(x: Array, y: Array) -> Array:
    """The upper half of a product of 32-bit integers."""
    wide = np.int64 if x.dtype == np.int32 else np.uint64
    return (np.multiply(x, y, dtype=wide) >> wide(32)).astype(x.dtype)


def _wide(x: Array, y: Array) -> Array:
    return np.multiply(x, y, dtype=np.int64 if x.dtype == np.int32 else np.uint64)


def _divide(x: Array, y: Array) -> Array:
    """Towards 0. By 0, PTX says nothing of the result: all bits are set."""
    y = np.asarray(y)
    by = np.where(y == 0, y.dtype.type(1), y)
    whole = x // by
    whole = whole + ((x % by != 0) & ((x < 0) != (by < 0))).astype(whole.dtype)
    return np.where(y == 0, ~y.dtype.type(0), whole)


def _remainder(x: Array, y: Array) -> Array:
    """Of the sign of x."""
    return np.where(y == 0, x, x - _divide(x, y) * y)


def _field(x: Array, start: Array, length: Array) -> Array:
    """bfe.u32: bits start ... start + length - 1."""
    start, length = start & np.uint32(255), np.minimum(length & np.uint32(255), 32)
    mask = (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)
    return ((x.astype(np.uint64) >> start.astype(np.uint64)) & mask).astype(np.uint32)


def _signed_field(x: Array, start: Array, length: Array) -> Array:
    """bfe.s32: its last bit, or that of x, fills up."""
    start = (start & np.uint32(255)).astype(np.int64)
    length = (length & np.uint32(255)).astype(np.int64)
    end = np.minimum(start + length, 32)
    moved = (x.astype(np.int64) << (64 - end)) >> np.minimum(64 - end + start, 63)
    return np.where(length == 0, 0, moved).astype(np.int32)


def _bytes(x: Array, y: Array, selector: Array) -> Array:
    """prmt: each byte of the result is one of eight; its 4th selecting bit copies the sign."""
    both = x.astype(np.uint64) | (y.astype(np.uint64) << np.uint64(32))
    result = np.uint64(0)
    for i in range(4):
        chosen = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((chosen & np.uint64(7)) << np.uint64(3))) & np.uint64(255)
        sign = np.where(byte > 127, np.uint64(255), np.uint64(0))
        byte = np.where(chosen > 7, sign, byte)
        result = result | (byte << np.uint64(8 * i))
    return result.astype(np.uint32)


def _funnel(low: Array, high: Array, amount: Array) -> Array:
    """shf.l.wrap: the upper half of both words, shifted left together by up to 31."""
    both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    return (both << (amount & np.uint32(31)) >> np.uint64(32)).astype(np.uint32)


def _select(x: Array, y: Array, chosen: Array) -> Array:
    return np.where(chosen, x, y)


def _define_integers() -> None:
    for bits in ("16", "32", "64"):
        b, u, s = "b" + bits, "u" + bits, "s" + bits
        for t in (u, s):
            # Modulo 2^n, and so the same for both.
            _define(f"add.{t}", np.add, f"{b} {b}", b)
            _define(f"sub.{t}", np.subtract, f"{b} {b}", b)
            _define(f"mul.lo.{t}", np.multiply, f"{b} {b}", b)
            _define(f"mad.lo.{t}", lambda x, y, z: x * y + z, f"{b} {b} {b}", b)
            _define(f"min.{t}", np.minimum, f"{t} {t}", t)
            _define(f"max.{t}", np.maximum, f"{t} {t}", t)
            _define(f"div.{t}", _divide, f"{t} {t}", t)
            _define(f"rem.{t}", _remainder, f"{t} {t}", t)
            # Past the width NumPy's shifts too give 0, or the sign.
            _define(f"shr.{t}", np.right_shift, f"{t} u32", t)
        _define(f"shr.{b}", np.right_shift, f"{b} u32", b)
        _define(f"shl.{b}", np.left_shift, f"{b} u32", b)
        _define(f"neg.{s}", np.negative, s, s)
        _define(f"abs.{s}", np.abs, s, s)
        _define(f"mov.{u}", np.positive, b, b)
    for t in ("u32", "s32"):
        wide = t[0] + "64"
        _define(f"mul.hi.{t}", _high, f"{t} {t}", t)
        _define(f"mul.wide.{t}", _wide, f"{t} {t}", wide)
        _define(f"mad.wide.{t}", lambda x, y, z: _wide(x, y) + z, f"{t} {t} {wide}", wide)
    for t in ("pred", "b16", "b32", "b64"):
        _define(f"and.{t}", np.bitwise_and, f"{t} {t}", t)
        _define(f"or.{t}", np.bitwise_or, f"{t} {t}", t)
        _define(f"xor.{t}", np.bitwise_xor, f"{t} {t}", t)
        _define(f"not.{t}", np.invert, t, t)
        _define(f"mov.{t}", lambda x: x, t, t)
    _define("bfe.u32", _field, "u32 u32 u32", "u32")
    _define("bfe.s32", _signed_field, "s32 u32 u32", "s32")
    _define("prmt.b32", _bytes, "b32 b32 b32", "b32")
    _define("shf.l.wrap.b32", _funnel, "b32 b32 u32", "b32")
    for t in ("b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"):
        _define(f"selp.{t}", _select, f"{t} {t} pred", t)


# Floating point


def _pairs(function: Function) -> Function:
    """Of two float32 in 64 bits, each by itself."""

    def of_pairs(*operands: Array) -> Array:
        halves = (np.atleast_1d(x).view(np.float32).reshape(-1, 2) for x in operands)
        return function(*halves).view(np.uint64)[:, 0]

    return of_pairs


def _define_floats() -> None:
    names = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    fma = {"f32": fma32, "f64": fma64}
    for t in ("f32", "f64"):
        for name, function in names.items():
            for rounding in ("", ".rn"):
                _define(f"{name}{rounding}.{t}", function, f"{t} {t}", t)
        _define(f"fma.rn.{t}", fma[t], f"{t} {t} {t}", t)
        _define(f"neg.{t}", np.negative, t, t)
        _define(f"abs.{t}", np.abs, t, t)
        _define(f"min.{t}", smaller, f"{t} {t}", t)
        _define(f"max.{t}", larger, f"{t} {t}", t)
        _define(f"div.rn.{t}", np.divide, f"{t} {t}", t)
        _define(f"rcp.rn.{t}", lambda x: 1 / x, t, t)
        _define(f"sqrt.rn.{t}", np.sqrt, t, t)
        _define(f"mov.{t}", np.positive, t, t)
    _define("min.NaN.f32", np.minimum, "f32 f32", "f32")
    _define("max.NaN.f32", np.maximum, "f32 f32", "f32")
    _define("abs.ftz.f32", lambda x: flush(np.abs(x)), "f32", "f32")
    for name, function in names.items():
        for rounding in ("", ".rn"):
            _define(f"{name}{rounding}.f32x2", _pairs(function), "f32x2 f32x2", "f32x2")
    _define("fma.rn.f32x2", _pairs(fma32), "f32x2 f32x2 f32x2", "f32x2")
    # A half and a float32: exact, rounded once.
    for half, widen in (("bf16", from_bf16), ("f16", lambda x: x.astype(np.float32))):
        for r in ("", ".rn"):
            _define(f"add{r}.f32.{half}", lambda x, y, w=widen: w(x) + y, f"{half} f32", "f32")
            _define(f"sub{r}.f32.{half}", lambda x, y, w=widen: w(x) - y, f"{half} f32", "f32")
        _define(f"fma.rn.f32.{half}", lambda x, y, z, w=widen: fma32(w(x), w(y), z),
                f"{half} {half} f32", "f32")  # fmt: skip
    _define("sqrt.approx.ftz.f32", approximate.sqrt, "f32", "f32")
    _define("lg2.approx.ftz.f32", approximate.lg2, "f32", "f32")
    _define("ex2.approx.ftz.f32", approximate.ex2, "f32", "f32")
    _define("div.full.f32", approximate.divide, "f32 f32", "f32")
    _define("rcp.approx.ftz.f64", approximate.reciprocal, "f64", "f64")


# Comparisons: of floats, those of the plain names are false beside a NaN, those with u true.

_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _unordered(x: Array, y: Array) -> Array:
    return np.isnan(x) | np.isnan(y)


def _define_comparisons() -> None:
    for bits in ("16", "32", "64"):
        for name, compare in _COMPARISONS.items():
            for t in ("u" + bits, "s" + bits, *(["b" + bits] if name in ("eq", "ne") else ())):
                _define(f"setp.{name}.{t}", compare, f"{t} {t}", "pred")
    values = dict.fromkeys(("f16", "f32", "f64"), np.positive) | {"bf16": from_bf16}
    for t, value in values.items():
        for name, compare in _COMPARISONS.items():

            def ordered(x, y, compare=compare, value=value):
                x, y = value(x), value(y)
                return compare(x, y) & ~_unordered(x, y)

            def or_unordered(x, y, compare=compare, value=value):
                x, y = value(x), value(y)
                return compare(x, y) | _unordered(x, y)

            _define(f"setp.{name}.{t}", ordered, f"{t} {t}", "pred")
            _define(f"setp.{name}u.{t}", or_unordered, f"{t} {t}", "pred")
        _define(f"setp.nan.{t}", lambda x, y, v=value: _unordered(v(x), v(y)), f"{t} {t}", "pred")
        _define(f"setp.num.{t}", lambda x, y, v=value: ~_unordered(v(x), v(y)), f"{t} {t}", "pred")


# Conversions


def _to(t: str) -> Function:
    return operator.methodcaller("astype", DTYPES[t])


def _two(half: Function) -> Function:
    """The first operand becomes the upper half."""

    def both(high: Array, low: Array) -> Array:
        return half(low).astype(np.uint32) | (half(high).astype(np.uint32) << np.uint32(16))

    return both


def _define_conversions() -> None:
    integers = [kind + bits for kind in "us" for bits in ("16", "32", "64")]
    for source in integers:
        for result in integers:
            _define(f"cvt.{result}.{source}", _to(result), source, result)
        for result in ("f32", "f64"):
            _define(f"cvt.rn.{result}.{source}", _to(result), source, result)
    for half in ("f16", "f32"):
        _define(f"cvt.f64.{half}", _to("f64"), half, "f64")
    _define("cvt.f32.f16", _to("f32"), "f16", "f32")
    _define("cvt.f32.bf16", from_bf16, "bf16", "f32")
    _define("cvt.f64.bf16", lambda x: from_bf16(x).astype(np.float64), "bf16", "f64")
    _define("cvt.rn.f32.f64", _to("f32"), "f64", "f32")
    _define("cvt.rn.f16.f32", _to("f16"), "f32", "f16")
    _define("cvt.rn.f16.f64", _to("f16"), "f64", "f16")
    _define("cvt.rn.bf16.f32", to_bf16, "f32", "bf16")
    _define("cvt.rn.bf16x2.f32", _two(to_bf16), "f32 f32", "b32")
    _define("cvt.rn.f16x2.f32", _two(lambda x: x.astype(np.float16).view(np.uint16)),
            "f32 f32", "b32")  # fmt: skip


_define_integers()
_define_floats()
_define_comparisons()
_define_conversions()
