"""The forward kernel: z, kl and kl_of_mean of one batch, in one launch.

With phi(l) = e^l - 1 - l, k(m, l) = (m^2 + phi(l)) / 2 in nats, and eps of ``philox``:

    z[b, j]     = mu[b, j] + exp(logvar[b, j] / 2) eps[b, j]
    kl[b]       = sum_j k(mu[b, j], logvar[b, j])          or its sum over b, over a denominator
    kl_of_mean  = sum_j k(mean_b mu[b, j], mean_b logvar[b, j])            MEAN_OVER = "batch"
                = k(mean_bj mu, mean_bj logvar)                             MEAN_OVER = "all"

Reads mu, the scale (eps if given); writes z; of size D or B only the means and kl rows.

Grid (column tiles, row ranges). A program walks down its rows with sums in registers. Sums are
finished in two steps by the last program to arrive: over the row ranges of a column tile, then
over the tiles. A pointer that is None drops its output and all work for it.
"""

import triton
import triton.language as tl

from .gaussian import divide, exp_terms, kl_terms
from .philox import normal_tile
from .reduction import arrive, sum_rows, sum_scalars
from .tile import columns, offsets, program, strides


@triton.jit
def _finish(
    p_kl,  # [] or None
    p_kl_of_mean,  # [] or None
    p_means,  # [2] here; MEAN_OVER = "all" only
    kl_sum,
    of_mean_sum,  # "batch": sum over tiles of twice the KL of the column means; "all": sum of mu
    logvar_sum,  # "all": sum of logvar
    kl_denominator,
    element_count,
    MEAN_OVER: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """All sums are known: write the scalars."""
    if p_kl is not None:
        tl.store(p_kl, divide(0.5 * kl_sum, kl_denominator.to(DTYPE)))
    if MEAN_OVER == "batch":
        tl.store(p_kl_of_mean, 0.5 * of_mean_sum)
    if MEAN_OVER == "all":
        mean_mu = divide(of_mean_sum, element_count.to(DTYPE))
        mean_logvar = divide(logvar_sum, element_count.to(DTYPE))
        tl.store(p_means, mean_mu)
        tl.store(p_means + 1, mean_logvar)
        tl.store(p_kl_of_mean, 0.5 * kl_terms(mean_mu, mean_logvar))


@triton.jit
def _finish_tile(
    p_kl,
    p_kl_of_mean,
    p_means,  # [2, D] for "batch", [2] for "all"
    p_scratch,  # [3, tiles]
    p_counter,
    kl_sum,
    b_mu_sum,  # [COLS] for "batch", scalar for "all"
    b_logvar_sum,
    kl_denominator,
    B,
    D,
    o_col,
    m_col,
    i_tile,
    n_tiles,
    MEAN_OVER: tl.constexpr,
    SPLIT_COLS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The sums of one column tile are known: its means, and with the last tile the scalars."""
    mu_sum = b_mu_sum
    logvar_sum = b_logvar_sum
    if MEAN_OVER == "batch":
        b_mean_mu = divide(b_mu_sum, B.to(DTYPE))
        b_mean_logvar = divide(b_logvar_sum, B.to(DTYPE))
        tl.store(p_means + o_col, b_mean_mu, m_col)
        tl.store(p_means + D + o_col, b_mean_logvar, m_col)
        mu_sum = tl.sum(tl.where(m_col, kl_terms(b_mean_mu, b_mean_logvar), 0.0))
        logvar_sum = mu_sum
    element_count = B.to(tl.int64) * D
    is_last = True
    if SPLIT_COLS:
        if p_kl is not None:
            tl.store(p_scratch + i_tile, kl_sum)
        if MEAN_OVER != "none":
            tl.store(p_scratch + n_tiles + i_tile, mu_sum)
        if MEAN_OVER == "all":
            tl.store(p_scratch + 2 * n_tiles + i_tile, logvar_sum)
        is_last = arrive(p_counter, n_tiles)
    if is_last:
        if SPLIT_COLS:
            if p_kl is not None:
                kl_sum = sum_scalars(p_scratch, n_tiles, DTYPE)
            if MEAN_OVER != "none":
                mu_sum = sum_scalars(p_scratch + n_tiles, n_tiles, DTYPE)
            if MEAN_OVER == "all":
                logvar_sum = sum_scalars(p_scratch + 2 * n_tiles, n_tiles, DTYPE)
        _finish(
            p_kl, p_kl_of_mean, p_means, kl_sum, mu_sum, logvar_sum,
            kl_denominator, element_count, MEAN_OVER, DTYPE,
        )  # fmt: skip


def scratch_size(tiles, ranges, column_sums, row_sums):
    """Elements of scratch: none where one program does it all.

    Its parts: [3, tiles] of _finish_tile, [3, tiles, ranges], columns [ranges, 2, D] if MEAN_OVER =
    "batch" (column_sums is D, else 0), rows [tiles, B] if PER_ROW (row_sums is B, else 0).
    """
    if tiles == ranges == 1:
        return 0
    return 3 * tiles * (ranges + 1) + 2 * ranges * column_sums + tiles * row_sums


def counter_count(tiles, ranges):
    """Counters: that of all tiles, of each tile's ranges, of each range's tiles."""
    return 1 + tiles + ranges


@triton.jit(
    do_not_specialize=[
        "seed",
        "offset",
        "key_on_device",
        "B",
        "D",
        "inner",
        "kl_denominator",
        "rows_per_range",
    ],
    do_not_specialize_on_alignment=strides("mu", "scale", "eps", "z"),
)
def forward_kernel(
    p_mu,  # [B, D]
    p_scale,  # [B, D], in the form of LOGVAR
    p_eps,  # [B, D], or None: drawn here
    p_z,  # [B, D], or None: not wanted
    p_kl,  # [B] if PER_ROW, else [], or None
    p_kl_of_mean,  # [], or None exactly if MEAN_OVER = "none"
    p_means,  # [2, D] for "batch", [2] for "all": batch means of mu and logvar, for backward
    p_key,  # int64[2]: the noise key used, for backward; None where nothing is drawn
    p_device_key,  # int64[2]: the noise key, read if key_on_device; else any pointer
    p_scratch,  # DTYPE[scratch_size], None where one program does it all
    p_counters,  # int32[counter_count], zero between launches
    seed: tl.int64,
    offset: tl.int64,
    key_on_device,
    lo: tl.float64,  # bounds on logvar, for LOGVAR
    hi: tl.float64,
    B,
    D,  # in UNITs, like inner, and the row and outer strides
    inner,
    rows_per_range,
    kl_denominator,
    mu_row, mu_outer, mu_inner,
    scale_row, scale_outer, scale_inner,
    eps_row, eps_outer, eps_inner,
    z_row, z_outer, z_inner,
    PER_ROW: tl.constexpr,  # kl is wanted for each sample
    MEAN_OVER: tl.constexpr,  # "none", "batch", "all"
    SPLIT_ROWS: tl.constexpr,  # there are several row ranges
    SPLIT_COLS: tl.constexpr,  # there are several column tiles
    LOGVAR: tl.constexpr,  # of the scale: a function of forms.py
    SPLIT_EVENT: tl.constexpr,
    UNIT: tl.constexpr,  # columns
    WIDE: tl.constexpr,  # int64 offsets
    DTYPE: tl.constexpr,  # of the computation: tl.float32, tl.float64
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    D = columns(D, UNIT, WIDE)
    inner = columns(inner, UNIT, WIDE)
    i_tile = program(0, WIDE)
    i_range = program(1, WIDE)
    n_tiles = tl.num_programs(0)
    n_ranges = tl.num_programs(1)
    KL_TOTAL: tl.constexpr = (p_kl is not None) and not PER_ROW
    KL_ROWS: tl.constexpr = (p_kl is not None) and PER_ROW

    if p_key is not None:
        if key_on_device != 0:
            seed = tl.load(p_device_key)
            offset = tl.load(p_device_key + 1)
        if i_tile + i_range == 0:
            tl.store(p_key, seed)
            tl.store(p_key + 1, offset)

    col = i_tile * BLOCK_COLS
    o_col = col + tl.arange(0, BLOCK_COLS)
    m_col = o_col < D
    if KL_TOTAL:
        b_kl_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
    if MEAN_OVER != "none":
        b_mu_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
        b_logvar_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
    # The parts of scratch are those of scratch_size; row partials lie last.
    if KL_ROWS and SPLIT_COLS:
        p_rows = p_scratch + 3 * n_tiles * (n_ranges + 1)
        if MEAN_OVER == "batch":
            p_rows += 2 * n_ranges.to(tl.int64) * D
        p_own_rows = p_rows + i_tile.to(tl.int64) * B

    first_row = i_range * rows_per_range
    for row in range(first_row, first_row + rows_per_range, BLOCK_ROWS):
        o_row = row + tl.arange(0, BLOCK_ROWS)
        m_row = o_row < B
        m_tile = m_row[:, None] & m_col[None, :]
        o_mu = offsets(o_row, o_col, inner, mu_row, mu_outer, mu_inner, SPLIT_EVENT, UNIT)
        o_scale = offsets(
            o_row, o_col, inner, scale_row, scale_outer, scale_inner, SPLIT_EVENT, UNIT
        )
        b_mu = tl.load(p_mu + o_mu, m_tile, 0.0).to(DTYPE)
        b_scale = tl.load(p_scale + o_scale, m_tile, 0.0).to(DTYPE)
        b_logvar = LOGVAR(b_scale, m_tile, lo, hi)
        b_std, _, b_phi = exp_terms(b_logvar)

        b_terms = b_mu * b_mu + b_phi
        if KL_TOTAL:
            b_kl_sum += b_terms
        if MEAN_OVER != "none":
            b_mu_sum += b_mu
            b_logvar_sum += b_logvar

        if p_z is not None:
            if p_eps is not None:
                o_eps = offsets(
                    o_row, o_col, inner, eps_row, eps_outer, eps_inner, SPLIT_EVENT, UNIT
                )
                b_eps = tl.load(p_eps + o_eps, m_tile, 0.0).to(DTYPE)
            else:
                b_eps = normal_tile(seed, offset, o_row, col, D, DTYPE, BLOCK_ROWS, BLOCK_COLS)
            o_z = offsets(o_row, o_col, inner, z_row, z_outer, z_inner, SPLIT_EVENT, UNIT)
            tl.store(p_z + o_z, b_mu + b_std * b_eps, m_tile)

        if KL_ROWS:
            b_row_kl = 0.5 * tl.sum(b_terms, axis=1)
            if SPLIT_COLS:
                tl.store(p_own_rows + o_row, b_row_kl, m_row)
            else:
                tl.store(p_kl + o_row, b_row_kl, m_row)

    if KL_ROWS and SPLIT_COLS:
        if arrive(p_counters + 1 + n_tiles + i_range, n_tiles):
            for row in range(first_row, min(first_row + rows_per_range, B), BLOCK_COLS):
                o_row = row + tl.arange(0, BLOCK_COLS)
                m_row = (o_row < B) & (o_row < first_row + rows_per_range)
                b_row_kl = sum_rows(p_rows, B, n_tiles, o_row, m_row, DTYPE, BLOCK_ROWS, BLOCK_COLS)
                tl.store(p_kl + o_row, b_row_kl, m_row)

    if KL_TOTAL or MEAN_OVER != "none":
        kl_sum = tl.zeros([], DTYPE)
        mu_sum = kl_sum
        logvar_sum = kl_sum
        if KL_TOTAL:
            kl_sum = tl.sum(b_kl_sum)
        if MEAN_OVER == "batch":
            mu_sum = tl.sum(b_mu_sum, axis=0)
            logvar_sum = tl.sum(b_logvar_sum, axis=0)
        if MEAN_OVER == "all":
            mu_sum = tl.sum(b_mu_sum)
            logvar_sum = tl.sum(b_logvar_sum)
        is_last = True
        if SPLIT_ROWS:
            p_partial = p_scratch + 3 * n_tiles + i_tile * n_ranges
            p_columns = p_scratch + 3 * n_tiles * (n_ranges + 1)
            n_partials = n_tiles * n_ranges
            if KL_TOTAL:
                tl.store(p_partial + i_range, kl_sum)
            if MEAN_OVER == "all":
                tl.store(p_partial + n_partials + i_range, mu_sum)
                tl.store(p_partial + 2 * n_partials + i_range, logvar_sum)
            if MEAN_OVER == "batch":
                p_column = p_columns + 2 * i_range.to(tl.int64) * D + o_col
                tl.store(p_column, mu_sum, m_col)
                tl.store(p_column + D, logvar_sum, m_col)
            is_last = arrive(p_counters + 1 + i_tile, n_ranges)
        if is_last:
            if SPLIT_ROWS:
                if KL_TOTAL:
                    kl_sum = sum_scalars(p_partial, n_ranges, DTYPE)
                if MEAN_OVER == "all":
                    mu_sum = sum_scalars(p_partial + n_partials, n_ranges, DTYPE)
                    logvar_sum = sum_scalars(p_partial + 2 * n_partials, n_ranges, DTYPE)
                if MEAN_OVER == "batch":
                    mu_sum = sum_rows(
                        p_columns, 2 * D, n_ranges, o_col, m_col, DTYPE, BLOCK_ROWS, BLOCK_COLS
                    )
                    logvar_sum = sum_rows(
                        p_columns + D, 2 * D, n_ranges, o_col, m_col, DTYPE, BLOCK_ROWS, BLOCK_COLS
                    )
            _finish_tile(
                p_kl if KL_TOTAL else None, p_kl_of_mean, p_means, p_scratch, p_counters,
                kl_sum, mu_sum, logvar_sum, kl_denominator, B, D, o_col, m_col, i_tile, n_tiles,
                MEAN_OVER, SPLIT_COLS, DTYPE,
            )  # fmt: skip
