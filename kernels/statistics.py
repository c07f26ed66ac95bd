"""The statistics kernel: sums of every column over the samples of a batch, in one launch.

With the shift s = mu[0, j], which keeps the variance of mu from cancelling, the rows of ``out`` are
the sums over b of

    mu - s,  (mu - s)^2,  l,  e^l,  phi(l),  [mu not finite],  [l not finite],  [l outside]

and s itself. All in float64, float16 inputs too: a diagnosis is no part of a training step.

Reads mu and logvar; writes [9, D]. Grid (column tiles, row ranges): a program walks down its rows
with sums in registers, and the last to arrive of a column tile adds those of the row ranges.
"""

import triton
import triton.language as tl

from .gaussian import exp_terms
from .reduction import GROUP, arrive, group_of, partial_sums
from .tile import columns, offsets, program, strides

SUMS = tl.constexpr(8)
AT_ONCE = tl.constexpr(4)  # of them, as many as registers hold of a group


@triton.jit
def _is_finite(b_values):
    return tl.abs(b_values) < float("inf")


def scratch_size(ranges, event):
    """Elements of scratch, [ranges, 8, D], then [groups, 8, D] of each round."""
    return partial_sums(ranges) * SUMS.value * event


def counter_count(tiles, ranges):
    """Counters: of each tile's groups in every round."""
    return tiles * partial_sums(ranges)


@triton.jit
def _add_group(p_from, p_to, count, D, m_col, COLS: tl.constexpr):
    """Add [count, 8, D] up to [8, D], in the columns of a tile."""
    stride = tl.full([], SUMS, tl.int64) * D
    o_row = tl.arange(0, GROUP)
    o_sum = tl.arange(0, AT_ONCE).to(tl.int64)[:, None] * D + tl.arange(0, COLS)[None, :]
    m_tile = (o_row < count)[:, None, None] & m_col[None, None, :]
    p_tile = p_from + (o_row.to(tl.int64) * stride)[:, None, None] + o_sum[None, :, :]
    for _ in tl.static_range(SUMS // AT_ONCE):
        b_parts = tl.load(p_tile, m_tile, 0.0, cache_modifier=".cg")
        tl.store(p_to + o_sum, tl.sum(b_parts, axis=0), m_col[None, :])
        p_tile += AT_ONCE * D
        p_to += AT_ONCE * D


@triton.jit(
    do_not_specialize=["B", "D", "inner", "rows_per_range", "lines"],
    do_not_specialize_on_alignment=strides("mu", "logvar"),
)
def statistics_kernel(
    p_mu,  # [B, D]
    p_logvar,  # [B, D]
    p_out,  # float64[9, D]
    p_scratch,  # float64[scratch_size], None where there is one range
    p_counters,  # int32[counter_count], zero between launches
    low: tl.float64,  # logvar is outside of [low, high]
    high: tl.float64,
    B,
    D,  # in UNITs, like inner, and the row and outer strides
    inner,
    rows_per_range,
    lines,  # partial_sums(ranges)
    mu_row, mu_outer, mu_inner,
    logvar_row, logvar_outer, logvar_inner,
    SPLIT_ROWS: tl.constexpr,  # there are several row ranges
    SPLIT_EVENT: tl.constexpr,
    UNIT: tl.constexpr,  # columns
    WIDE: tl.constexpr,  # int64 offsets
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    D = columns(D, UNIT, WIDE)
    inner = columns(inner, UNIT, WIDE)
    i_range = program(1, WIDE)
    n_ranges = tl.num_programs(1)
    i_tile = program(0, WIDE)
    col = i_tile * BLOCK_COLS
    o_col = col + tl.arange(0, BLOCK_COLS)
    m_col = o_col < D

    o_first = offsets(tl.arange(0, 1), o_col, inner, mu_row, mu_outer, mu_inner, SPLIT_EVENT, UNIT)
    b_shift = tl.load(p_mu + o_first, m_col[None, :], 0.0).to(tl.float64)

    b_shifted = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float64)
    b_squares = b_shifted
    b_logvars = b_shifted
    b_exps = b_shifted
    b_phis = b_shifted
    b_bad_mu = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.int32)
    b_bad_logvar = b_bad_mu
    b_outside = b_bad_mu
    first_row = i_range * rows_per_range
    for row in range(first_row, first_row + rows_per_range, BLOCK_ROWS):
        o_row = row + tl.arange(0, BLOCK_ROWS)
        m_tile = (o_row < B)[:, None] & m_col[None, :]
        o_mu = offsets(o_row, o_col, inner, mu_row, mu_outer, mu_inner, SPLIT_EVENT, UNIT)
        o_logvar = offsets(
            o_row, o_col, inner, logvar_row, logvar_outer, logvar_inner, SPLIT_EVENT, UNIT
        )
        b_mu = tl.load(p_mu + o_mu, m_tile, 0.0).to(tl.float64)
        b_logvar = tl.load(p_logvar + o_logvar, m_tile, 0.0).to(tl.float64)
        b_distance = tl.where(m_tile, b_mu - b_shift, 0.0)
        b_shifted += b_distance
        b_squares += b_distance * b_distance
        _, _, b_phi = exp_terms(b_logvar)
        b_logvars += b_logvar
        b_exps += tl.where(m_tile, tl.exp(b_logvar), 0.0)
        b_phis += b_phi
        b_finite = _is_finite(b_logvar)
        b_bad_mu += (~_is_finite(b_mu)).to(tl.int32)
        b_bad_logvar += (~b_finite).to(tl.int32)
        b_outside += (b_finite & ((b_logvar < low) | (b_logvar > high))).to(tl.int32)

    if SPLIT_ROWS:
        p_first = p_scratch + i_range.to(tl.int64) * SUMS * D + o_col
    else:
        p_first = p_out + o_col
    p_row = p_first
    tl.store(p_row, tl.sum(b_shifted, axis=0), m_col)
    p_row += D
    tl.store(p_row, tl.sum(b_squares, axis=0), m_col)
    p_row += D
    tl.store(p_row, tl.sum(b_logvars, axis=0), m_col)
    p_row += D
    tl.store(p_row, tl.sum(b_exps, axis=0), m_col)
    p_row += D
    tl.store(p_row, tl.sum(b_phis, axis=0), m_col)
    p_row += D
    tl.store(p_row, tl.sum(b_bad_mu, axis=0).to(tl.float64), m_col)
    p_row += D
    tl.store(p_row, tl.sum(b_bad_logvar, axis=0).to(tl.float64), m_col)
    p_row += D
    tl.store(p_row, tl.sum(b_outside, axis=0).to(tl.float64), m_col)

    is_last = True
    if SPLIT_ROWS:
        i, n, line = i_range, n_ranges, 0 * n_ranges
        is_last = n > 1
        # Of pointers the loop may carry or choose none: AMD's compiler fails.
        while is_last & (n > 1):
            first, count = group_of(i, n)
            is_last = arrive(p_counters + i_tile * lines + line + i // GROUP, count)
            if is_last:
                p_from = p_scratch + (line + first).to(tl.int64) * SUMS * D + col
                if n <= GROUP:
                    _add_group(p_from, p_out + col, count, D, m_col, BLOCK_COLS)
                else:
                    p_to = p_scratch + (line + n + i // GROUP).to(tl.int64) * SUMS * D + col
                    _add_group(p_from, p_to, count, D, m_col, BLOCK_COLS)
            line += n
            i = i // GROUP
            n = tl.cdiv(n, GROUP)
    if is_last:
        p_shift = p_out + tl.full([], SUMS, tl.int64) * D
        tl.store(p_shift + o_col[None, :], b_shift, m_col[None, :])
