"""Device code: four standard normals from one Philox4x32-10 call.

Philox4x32-10 (Salmon et al. 2011) with key = seed and counter words (offset / 4, group), each 64
bits wide. Words (w0, w1) and (w2, w3) make one Box-Muller pair each: with u = (w0 + 1/2) 2^-32,
radius = sqrt(-2 ln u) and angle = 2 pi w1 2^-32, the pair is radius (cos angle, sin angle). All 32
bits count: tails reach 6.7 sigma and u is never 0.

Element [b, j] is lane j % 4 of group b ceil(D / 4) + j // 4, whatever the block sizes and grid.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice
from triton.language.target_info import is_cuda

from . import coefficients
from .gaussian import polynomial
from .tile import load, places

LOG_F32 = tl.constexpr(coefficients.LOG_F32)
SIN_F32 = tl.constexpr(coefficients.SIN_F32)
COS_F32 = tl.constexpr(coefficients.COS_F32)
SIN_F64 = tl.constexpr(coefficients.SIN_F64)
COS_F64 = tl.constexpr(coefficients.COS_F64)
NEAR_ONE = tl.constexpr(0xFC000000)  # u >= 63/64
MINUS_TWO_LN2 = tl.constexpr(-1.3862943611198906)
TWO_M32 = tl.constexpr(2.0**-32)
TWO_M33 = tl.constexpr(2.0**-33)


@triton.constexpr_function
def _has_fast_log2():
    """lg2.approx is CUDA's alone, and the interpreter has no libdevice."""
    return is_cuda() and not triton.knobs.runtime.interpret


@triton.jit
def _philox(seed, offset, b_group):
    """The four words of each group."""
    # Whole 64-bit products: one instruction gives both halves.
    counter = offset.to(tl.uint64) >> 2
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    b_c2 = b_group.to(tl.uint32)
    if b_group.dtype == tl.int64:
        b_c3 = (b_group >> 32).to(tl.uint32)
    else:
        b_c3 = tl.zeros_like(b_c2)
    k0 = seed.to(tl.uint64).to(tl.uint32)
    k1 = (seed.to(tl.uint64) >> 32).to(tl.uint32)
    b_c0 = tl.zeros_like(b_c2) + c0
    b_c1 = tl.zeros_like(b_c2) + c1
    for _ in tl.static_range(10):
        b_p0 = b_c0.to(tl.uint64) * 0xD2511F53
        b_p1 = b_c2.to(tl.uint64) * 0xCD9E8D57
        b_c0 = (b_p1 >> 32).to(tl.uint32) ^ b_c1 ^ k0
        b_c1 = b_p1.to(tl.uint32)
        b_c2 = (b_p0 >> 32).to(tl.uint32) ^ b_c3 ^ k1
        b_c3 = b_p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return b_c0, b_c1, b_c2, b_c3


@triton.jit
def _radius(b_word, DTYPE: tl.constexpr):
    """sqrt(-2 ln u) of the word."""
    b_u = b_word.to(DTYPE) * TWO_M32 + TWO_M33
    if DTYPE == tl.float64:
        b_square = tl.log(b_u) * -2.0
    else:
        # Near u = 1 only the signed word still has the digits of 1 - u.
        b_near_one = polynomial(b_word.to(tl.int32, bitcast=True).to(tl.float32), LOG_F32)
        if _has_fast_log2():
            b_log2 = libdevice.fast_log2f(b_u)
        else:
            b_log2 = tl.log2(b_u)
        b_square = tl.where(b_word >= NEAR_ONE, b_near_one, b_log2 * MINUS_TWO_LN2)
    return tl.sqrt(b_square)


@triton.jit
def pair(b_radius_word, b_angle_word, DTYPE: tl.constexpr):
    """Two normals from two words."""
    b_radius = _radius(b_radius_word, DTYPE)
    # The angle is pi (x + half turns) with x in [-1/2, 1/2); a half turn flips both signs. No
    # library sine: its range reduction for huge angles branches and takes local memory.
    b_double = b_angle_word << 1
    b_x = b_double.to(tl.int32, bitcast=True).to(DTYPE) * TWO_M32
    b_x2 = b_x * b_x
    b_flip = (b_angle_word ^ b_double) & 0x80000000
    if DTYPE == tl.float64:
        b_radius = tl.where(b_flip != 0, -b_radius, b_radius)
        b_cos = polynomial(b_x2, COS_F64)
        b_sin = b_x * polynomial(b_x2, SIN_F64)
    else:
        b_radius = (b_radius.to(tl.uint32, bitcast=True) ^ b_flip).to(tl.float32, bitcast=True)
        b_cos = polynomial(b_x2, COS_F32)
        b_sin = b_x * polynomial(b_x2, SIN_F32)
    return b_radius * b_cos, b_radius * b_sin


@triton.jit
def normal4(seed, offset, b_group, DTYPE: tl.constexpr):
    """The four lanes of each group. seed, offset: int64 scalars; b_group: int32 or int64 block."""
    b_w0, b_w1, b_w2, b_w3 = _philox(seed, offset, b_group)
    b_n0, b_n1 = pair(b_w0, b_w1, DTYPE)
    b_n2, b_n3 = pair(b_w2, b_w3, DTYPE)
    return b_n0, b_n1, b_n2, b_n3


@triton.jit
def key_of_call(p_key, p_device_key, key_on_device, seed, offset, is_first):
    """The key (seed, offset), from the device if it is there; the first program keeps it."""
    if key_on_device != 0:
        seed = tl.load(p_device_key)
        offset = tl.load(p_device_key + 1)
    if is_first:
        tl.store(p_key, seed)
        tl.store(p_key + 1, offset)
    return seed, offset


@triton.jit
def noise_of_rows(p_samples, seed, offset, o_row, m_row, KEYED: tl.constexpr):
    """(seed, offset, sample) that each row draws from: the key and the row itself, or what
    p_samples says, int64: its sample's id [B], or if KEYED a key [B, 2] of which it is sample 0.
    """
    if p_samples is None:
        b_seed, b_offset, o_sample = seed, offset, o_row
    elif KEYED:
        p_row = p_samples + 2 * o_row.to(tl.int64)
        b_seed = tl.load(p_row, m_row, 0)[:, None]
        b_offset = tl.load(p_row + 1, m_row, 0)[:, None]
        o_sample = tl.zeros_like(o_row)
    else:
        b_seed, b_offset = seed, offset
        o_sample = tl.load(p_samples + o_row, m_row, 0)
    return b_seed, b_offset, o_sample


@triton.jit
def normal_tile(
    seed, offset, o_sample, col, D,
    CHANNELS: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """eps of samples o_sample and columns col .. col + COLS (col a multiple of 4): [ROWS, COLS].

    seed and offset are one for all, or [ROWS, 1]. Of CHANNELS, columns are so many groups beside
    each other; col is a multiple of 4 CHANNELS.
    """
    groups = (D + 3) // 4
    o_group = places(col // 4 + tl.arange(0, COLS // 4), groups, CHANNELS)
    b_group = o_sample[:, None] * groups + o_group[None, :]
    b_n0, b_n1, b_n2, b_n3 = normal4(seed, offset, b_group, DTYPE)
    b_lanes = tl.join(tl.join(b_n0, b_n2), tl.join(b_n1, b_n3))
    if CHANNELS > 1:
        b_lanes = tl.reshape(b_lanes, (ROWS, COLS // 4 // CHANNELS, CHANNELS, 4))
        b_lanes = tl.permute(b_lanes, (0, 1, 3, 2))
    return tl.reshape(b_lanes, (ROWS, COLS))


@triton.jit
def noise_tile(
    p_eps, o_eps, m_tile, p_samples, seed, offset, o_row, m_row, col, D,
    KEYED: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """eps of a tile: given, or drawn."""
    if p_eps is not None:
        b_eps = load(p_eps, o_eps, m_tile, 0.0, DTYPE)
    else:
        b_seed, b_offset, o_sample = noise_of_rows(p_samples, seed, offset, o_row, m_row, KEYED)
        b_eps = normal_tile(b_seed, b_offset, o_sample, col, D, CHANNELS, DTYPE, ROWS, COLS)
    return b_eps
