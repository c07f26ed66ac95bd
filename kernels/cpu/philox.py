"""CPU code: the noise of a block, the twin of ``philox`` (the formulas are there)."""

import math
from typing import NamedTuple

from numba import njit, types
from numba.extending import overload

from .. import coefficients
from .memory import BLOCK, array_at, read
from .numeric import INLINE, JIT, as_f32, as_f64, as_i32, as_i64, f32, horner, i32, i64, u32, u64

LN_F32 = tuple(map(f32, coefficients.LN_F32))
SIN_F32 = tuple(map(f32, coefficients.SIN_F32))
COS_F32 = tuple(map(f32, coefficients.COS_F32))
HALF, ONE, TWO, LN2 = f32(0.5), f32(1.0), f32(2.0), f32(math.log(2.0))
TWO_M32 = f32(2.0**-32)
TWO_M33 = f32(2.0**-33)
SQRT_HALF_BITS = i32(0x3F3504F3)
LN_F64, SIN_F64, COS_F64 = coefficients.LN_F64, coefficients.SIN_F64, coefficients.COS_F64
SQRT_HALF_BITS_F64 = 0x3FE6A09E667F3BCD
LN2_F64 = math.log(2.0)
WORD = u64(0xFFFFFFFF)
NOISE_BLOCKS = 2  # of a worker's memory, while noise is made


class Key(NamedTuple):
    """What noise is drawn from."""

    seed: int
    offset: int
    samples: int  # address, int64: what each row draws; 0: rows are counted
    keyed: int  # 1: samples are keys [B, 2], else ids [B]


@njit(**INLINE)
def rounds(key, group):
    """The four words of a group."""
    counter = u64(key.offset) >> u64(2)
    k0, k1 = u64(key.seed) & WORD, u64(key.seed) >> u64(32)
    m0, m1 = u64(0xD2511F53), u64(0xCD9E8D57)
    s0, s1 = u64(0x9E3779B9), u64(0xBB67AE85)
    c0, c1 = counter & WORD, counter >> u64(32)
    c2, c3 = group & WORD, group >> u64(32)
    # Whole 64-bit products: one instruction gives both halves.
    for turn in range(10):
        p0, p1 = m0 * c0, m1 * c2
        c0 = (p1 >> u64(32)) ^ c1 ^ ((k0 + u64(turn) * s0) & WORD)
        c1 = p1 & WORD
        c2 = (p0 >> u64(32)) ^ c3 ^ ((k1 + u64(turn) * s1) & WORD)
        c3 = p0 & WORD
    return u32(c0), u32(c1), u32(c2), u32(c3)


@njit(**JIT)
def philox(key, first, words):
    """The words of groups first, first + 1, ...: an array for each of the four."""
    w0, w1, w2, w3 = words
    for i in range(len(w0)):
        w0[i], w1[i], w2[i], w3[i] = rounds(key, u64(first + i))


@njit(**JIT)
def philox_of_groups(key, groups, words):
    """The same of any groups."""
    w0, w1, w2, w3 = words
    for i in range(len(w0)):
        w0[i], w1[i], w2[i], w3[i] = rounds(key, u64(groups[i]))


@njit(**JIT)
def pairs_f32(radius_words, angle_words, cosines, sines):
    """Box-Muller: two normals of each pair of words (int32 views)."""
    a, b, c, d, e, f, g, h, k = LN_F32
    s0, s1, s2, s3, s4 = SIN_F32
    c0, c1, c2, c3, c4 = COS_F32
    for i in range(len(cosines)):
        # x = u, or u - 1 for u >= 1/2: there only the signed word still has the digits of 1 - u.
        word = radius_words[i]
        x = f32(word) * TWO_M32 + TWO_M33
        u = x if word >= 0 else x + ONE
        # u = 2^n (1 + y) with 1 + y in [sqrt(1/2), sqrt(2)).
        bits = as_i32(u)
        n = i32(bits - SQRT_HALF_BITS) >> 23
        y = as_f32(i32(bits - (n << 23))) - ONE
        y = x if (word < 0) & (n == 0) else y
        tail = (((((((a * y + b) * y + c) * y + d) * y + e) * y + f) * y + g) * y + h) * y + k
        y2 = y * y
        ln = y + (y2 * (y * tail - HALF) + f32(i32(n)) * LN2)
        radius = math.sqrt(-TWO * ln)
        # The angle is pi (t + half turns), t in [-1/2, 1/2); a half turn flips both signs.
        angle = angle_words[i]
        double = i32(angle << 1)
        t = f32(double) * TWO_M32
        radius = as_f32(as_i32(radius) ^ i32((angle ^ double) & i32(-0x80000000)))
        t2 = t * t
        cosines[i] = radius * ((((c0 * t2 + c1) * t2 + c2) * t2 + c3) * t2 + c4)
        sines[i] = radius * (t * ((((s0 * t2 + s1) * t2 + s2) * t2 + s3) * t2 + s4))


@njit(**JIT)
def pairs_f64(radius_words, angle_words, cosines, sines):
    """Box-Muller: two normals of each pair of words (int32 views)."""
    for i in range(len(cosines)):
        u = (float(i64(radius_words[i]) & 0xFFFFFFFF) + 0.5) * 2.0**-32
        # u = 2^n (1 + s) / (1 - s) with the fraction in [sqrt(1/2), sqrt(2)).
        bits = as_i64(u)
        n = (bits - SQRT_HALF_BITS_F64) >> 52
        fraction = as_f64(bits - (n << 52))
        s = (fraction - 1.0) / (fraction + 1.0)
        radius = math.sqrt(-2.0 * (s * horner(s * s, LN_F64) + float(n) * LN2_F64))
        # The angle is pi (t + half turns), t in [-1/2, 1/2); a half turn flips both signs.
        double = i32(angle_words[i] << 1)
        t = float(double) * 2.0**-32
        radius = -radius if (angle_words[i] ^ double) < 0 else radius
        cosines[i] = radius * horner(t * t, COS_F64)
        sines[i] = radius * (t * horner(t * t, SIN_F64))


def pairs(radius_words, angle_words, cosines, sines):
    """Box-Muller in the precision of the results."""
    raise NotImplementedError("compiled code only")


@overload(pairs, jit_options=JIT)
def _pairs(radius_words, angle_words, cosines, sines):
    if cosines.dtype == types.float32:
        return lambda radius_words, angle_words, cosines, sines: pairs_f32(
            radius_words, angle_words, cosines, sines
        )
    return lambda radius_words, angle_words, cosines, sines: pairs_f64(
        radius_words, angle_words, cosines, sines
    )


@njit(**JIT)
def interleave(cosines, sines, n, eps):
    """Group g takes pairs g and n + g: its lane k goes to place 4 g + k."""
    for g in range(n):
        eps[4 * g] = cosines[g]
        eps[4 * g + 1] = sines[g]
        eps[4 * g + 2] = cosines[n + g]
        eps[4 * g + 3] = sines[n + g]


@njit(**JIT)
def philox_of_ids(key, place, groups, words):
    """The words of a block's groups, of the samples that its rows draw; room for their numbers."""
    each = len(groups) // place.rows
    for r in range(place.rows):
        sample = read(key.samples, place.row + r, i64(0))
        first = sample * ((place.event + 3) // 4) + place.col // 4
        for i in range(each):
            groups[r * each + i] = first + i
    philox_of_groups(key, groups, words)


@njit(**JIT)
def philox_of_keys(key, place, words):
    """The same where each row has a key of its own, of which it is sample 0."""
    w0, w1, w2, w3 = words
    each = len(w0) // place.rows
    for r in range(place.rows):
        at = 2 * (place.row + r)
        own = Key(read(key.samples, at, i64(0)), read(key.samples, at + 1, i64(0)), 0, 0)
        here, end = r * each, (r + 1) * each
        of_row = w0[here:end], w1[here:end], w2[here:end], w3[here:end]
        philox(own, place.col // 4, of_row)


@njit(**JIT)
def noise(key, place, memory, eps):
    """eps of a place; it has room for a block, and memory for NOISE_BLOCKS of them."""
    rows, cols = place.rows, place.cols
    pitch = (cols + 3) // 4 * 4
    n = rows * pitch // 4
    first = place.row * ((place.event + 3) // 4) + place.col // 4
    lanes, bits = memory[:BLOCK], array_at(memory[BLOCK:].ctypes.data, i32(0), BLOCK)
    # First pairs, then second ones: one long pass costs less than two.
    radii, angles = bits[: 2 * n], bits[2 * n : 4 * n]
    cosines, sines = lanes[: 2 * n], lanes[2 * n : 4 * n]
    words = radii[:n], angles[:n], radii[n:], angles[n:]
    if key.samples == 0:
        philox(key, first, words)
    elif key.keyed != 0:
        philox_of_keys(key, place, words)
    else:
        groups = array_at(eps.ctypes.data, i64(0), n)  # eps comes later
        philox_of_ids(key, place, groups, words)
    if cols <= 2:  # second pairs are not used
        pairs(radii[:n], angles[:n], cosines[:n], sines[:n])
        for r in range(rows):
            eps[r * cols] = cosines[r]
            eps[r * cols + cols - 1] = sines[r] if cols == 2 else cosines[r]
        return
    pairs(radii, angles, cosines, sines)
    interleave(cosines, sines, n, eps)
    if pitch != cols:  # lanes past the last column are not used
        for r in range(1, rows):
            for j in range(cols):
                eps[r * cols + j] = eps[r * pitch + j]
