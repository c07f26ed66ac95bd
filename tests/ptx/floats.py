"""Floating point as PTX defines it, where it is not NumPy's own.

An FMA rounds once. Approximate instructions are exact here, or, with ``approximate.errors``, off by
a random amount up to what PTX allows them.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray  # of any type; lanes along its one axis, or none for a constant

_TINY = np.float32(2.0**-126)  # the smallest normal number
_HALF_WAY = np.int64(0x1000_0000)  # of a float32's ulp, in the bits of a float64
_BELOW = np.int64(0x1FFF_FFFF)


def from_bf16(bits: Array) -> Array:
    """The float32 of a bfloat16's bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """The bits of a float32 rounded to bfloat16, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def flush(x: Array) -> Array:
    """Subnormal float32 become 0 of their sign (.ftz)."""
    return np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """The product is exact in float64, and so only the sum's rounding can be one of two."""
    product = a.astype(np.float64) * b
    total = product + c
    bits = np.asarray(total).view(np.int64)
    near = ((bits & _BELOW) == _HALF_WAY) | (np.abs(total) < _TINY)
    if near.any():
        total = _to_odd(total, _error_of_sum(product, c.astype(np.float64), total))
    return total.astype(np.float32)


def _error_of_sum(x: Array, y: Array, total: Array) -> Array:
    """x + y - total, exactly (Knuth)."""
    part = total - x
    return (x - (total - part)) + (y - part)


def _to_odd(total: Array, error: Array) -> Array:
    """An inexact sum becomes its neighbour with an odd last bit: a later rounding is then right."""
    bits = np.asarray(total).view(np.int64)
    step = np.where((error > 0) == (total > 0), 1, -1)
    wrong = np.isfinite(total) & np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    return np.where(wrong, bits + step, bits).view(np.float64)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """Boldo and Melquiond's, and fractions where a product's error would not be a float64."""
    a, b, c = np.broadcast_arrays(np.atleast_1d(a), b, c)
    high = a * b
    low = _error_of_product(a, b, high)
    upper = c + low
    lower = _error_of_sum(c, low, upper)
    total = high + upper
    rest = lower + _error_of_sum(high, upper, total)
    rest_error = _error_of_sum(lower, _error_of_sum(high, upper, total), rest)
    result = total + _to_odd(rest, rest_error)
    result = np.where(result == 0, high + c, result)  # of the right sign
    simple = _between(a, 450) & _between(b, 450) & _between(high, 900) & _between(c, 900)
    for i in np.flatnonzero(~simple):
        result[i] = _fma_by_fractions(float(a[i]), float(b[i]), float(c[i]))
    return result


def _between(x: Array, exponent: int) -> Array:
    """0, or of a size between these powers of 2."""
    size = np.abs(x)
    return (x == 0) | ((size > 2.0**-exponent) & (size < 2.0**exponent))


def _error_of_product(a: Array, b: Array, product: Array) -> Array:
    """a * b - product, exactly (Dekker)."""
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    return ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def _halves(x: Array) -> tuple[Array, Array]:
    """Two numbers of 26 bits that add up to x (Veltkamp)."""
    scaled = x * 134217729.0
    high = scaled - (scaled - x)
    return high, x - high


def _fma_by_fractions(a: float, b: float, c: float) -> float:
    plain = np.float64(a) * b + c
    if not np.isfinite([a, b, c]).all():
        return float(plain)
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:  # its sign is that of the plain sum, unless the product is too small for one
        zero = a * b == 0 or c == 0
        return float(np.float64(np.copysign(0, a) * np.copysign(1, b)) + c if zero else plain)
    try:
        return float(exact)
    except OverflowError:
        return float(np.copysign(np.inf, float(exact > 0) - 0.5))


def smaller(x: Array, y: Array) -> Array:
    """The number of two of which one is NaN; -0 before 0."""
    least = np.fmin(x, y)
    return np.where((x == 0) & (y == 0) & np.signbit(x), x, least)


def larger(x: Array, y: Array) -> Array:
    """The number of two of which one is NaN; 0 before -0."""
    most = np.fmax(x, y)
    return np.where((x == 0) & (y == 0) & ~np.signbit(x), x, most)


class Approximate:
    """The approximate instructions, within the errors that the PTX manual states."""

    def __init__(self) -> None:
        self.errors: int | None = None  # a seed: for the same operand always the same error

    def _off(self, exact: Array, largest: float, x: Array, relative: bool | Array = True) -> Array:
        if self.errors is None:
            return exact
        bits = x.view(np.uint32).astype(np.uint64) + np.uint64(self.errors)
        for factor in (0x9E37_79B9_7F4A_7C15, 0xBF58_476D_1CE4_E5B9):  # mixed as SplitMix64 does
            bits = bits * np.uint64(factor)
            bits = bits ^ (bits >> np.uint64(31))
        error = largest * (bits.astype(np.float64) * 2.0**-63 - 1)
        return exact + np.where(relative, exact * error, error)

    def lg2(self, x: Array) -> Array:
        """2^-22: absolute between 1/2 and 2, else relative."""
        x = flush(x)
        relative = (x <= 0.5) | (x >= 2)
        return self._off(np.log2(x.astype(np.float64)), 2.0**-22, x, relative).astype(np.float32)

    def ex2(self, x: Array) -> Array:
        """2^-22."""
        exact = np.exp2(flush(x).astype(np.float64))
        return flush(self._off(exact, 2.0**-22, x).astype(np.float32))

    def sqrt(self, x: Array) -> Array:
        """2^-23."""
        x = flush(x)
        return self._off(np.sqrt(x.astype(np.float64)), 2.0**-23, x).astype(np.float32)

    def divide(self, x: Array, y: Array) -> Array:
        """Two units in the last place."""
        return self._off(x.astype(np.float64) / y, 2.0**-22, x + y).astype(np.float32)

    def reciprocal(self, x: Array) -> Array:
        """Of a float64, of which the upper word alone is given."""
        inverse = np.asarray(1.0 / x).view(np.uint64) & np.uint64(0xFFFF_FFFF_0000_0000)
        return inverse.view(np.float64)


approximate = Approximate()

Function = Callable[..., Array]
