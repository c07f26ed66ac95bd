"""The forward kernel: z, kl and kl_of_mean of one batch, in one launch.

With phi(l) = e^l - 1 - l, k(m, l) = (m^2 + phi(l)) / 2 in nats, and eps of ``philox``:

    z[b, j]     = mu[b, j] + exp(logvar[b, j] / 2) eps[b, j]
    kl[b]       = sum_j k(mu[b, j], logvar[b, j])          or its sum over b, over a denominator
    kl[j]       = sum_b k(mu[b, j], logvar[b, j]) / B                      PER_COL
    kl_of_mean  = sum_j k(mean_b mu[b, j], mean_b logvar[b, j])            MEAN_OVER = "batch"
                = k(mean_bj mu, mean_bj logvar)                             MEAN_OVER = "all"

Against a prior k is what ``prior`` says. Reads mu, the scale (eps, a prior if given); writes z; of
size D or B only the means and kl rows.

Grid (walkers, row ranges): a program walks down its rows with sums in registers, and where there is
one range may go on to further column tiles. Sums are finished by the last program to arrive: over
the row ranges of a walker, then over the walkers. A pointer that is None drops its output and all
work for it.
"""

import triton
import triton.language as tl

from .finish import add_ranges, column_kls, event_means, finish, finish_rows
from .philox import key_of_call, noise_tile
from .prior import prior_columns, prior_tile
from .reduction import arrive, column_sums
from .tile import columns, event_columns, fit, offsets, program, rows_of_columns, strides


@triton.jit(
    do_not_specialize=[
        "seed",
        "offset",
        "key_on_device",
        "B",
        "D",
        "inner",
        "beside",
        "kl_denominator",
        "rows_per_range",
        "n_tiles",
        "lines",
    ],
    do_not_specialize_on_alignment=strides("mu", "scale", "eps", "z", "prior_mean", "prior_scale"),
)
def forward_kernel(
    p_mu,  # [B, D]
    p_scale,  # [B, D], in the form of TERMS
    p_eps,  # [B, D], or None: drawn here
    p_prior_mean,  # [B, D] or, if SHARED, [D]; None as is its scale: N(0, I)
    p_prior_scale,
    p_z,  # [B, D], or None: not wanted
    p_kl,  # [B] if PER_ROW, [D] if PER_COL, else [], or None
    p_kl_of_mean,  # [], or None exactly if MEAN_OVER = "none"
    p_means,  # [2, D] for "batch", [2] for "all": batch means of mu and logvar, for backward
    p_key,  # int64[2]: the noise key used, for backward; None where nothing is drawn
    p_device_key,  # int64[2]: the noise key, read if key_on_device; else any pointer
    p_samples,  # what philox.noise_of_rows says, or None
    p_scratch,  # of DTYPE, laid out as Scratch says; None where one program does it all
    p_counters,  # int32[counter_count], zero between launches
    seed: tl.int64,
    offset: tl.int64,
    key_on_device,
    lo: tl.float64,  # bounds on logvar, if CLAMP
    hi: tl.float64,
    B,
    D,  # in UNITs, like inner, and the row and outer strides
    inner,
    beside,  # samples in a row, if EVENT_COLS
    rows_per_range,
    kl_denominator,
    n_tiles,  # column tiles
    lines,  # as Scratch has them
    columns_at,
    rows_at,
    mu_row, mu_outer, mu_inner,
    scale_row, scale_outer, scale_inner,
    eps_row, eps_outer, eps_inner,
    z_row, z_outer, z_inner,
    prior_mean_row, prior_mean_outer, prior_mean_inner,  # None where there is no prior
    prior_scale_row, prior_scale_outer, prior_scale_inner,
    PER_ROW: tl.constexpr,  # kl is wanted for each sample
    PER_COL: tl.constexpr,  # for each element of an event
    MEAN_OVER: tl.constexpr,  # "none", "batch", "all"
    SPLIT_ROWS: tl.constexpr,  # there are several row ranges
    SPLIT_COLS: tl.constexpr,  # there are several walkers
    WALKS: tl.constexpr,  # and each has several column tiles
    ROW_PARTS: tl.constexpr,  # row_parts of the walkers
    IDLE: tl.constexpr,  # of the scale: what forms.py has
    LOGVAR: tl.constexpr,  # None where there is no prior
    ROOT: tl.constexpr,
    TERMS: tl.constexpr,
    CLAMP: tl.constexpr,  # logvar is bounded
    SHARED: tl.constexpr,  # the prior is all samples'
    KEYED: tl.constexpr,  # p_samples are keys
    EVENT_COLS: tl.constexpr,  # that hold an event, of samples beside each other; else 0
    SPLIT_EVENT: tl.constexpr,
    UNIT: tl.constexpr,  # columns
    CHANNELS: tl.constexpr,  # the order of columns
    WIDE: tl.constexpr,  # int64 offsets
    DTYPE: tl.constexpr,  # of the computation: tl.float32, tl.float64
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    D = columns(D, UNIT, WIDE)
    if CHANNELS > 1:
        inner = CHANNELS
    else:
        inner = columns(inner, UNIT, WIDE)
    width = D
    if EVENT_COLS > 0:
        width = beside * inner
    i_walker = program(0, WIDE)
    i_range = program(1, WIDE)
    n_walkers = tl.num_programs(0)
    n_ranges = tl.num_programs(1)
    KL_TOTAL: tl.constexpr = (p_kl is not None) and not PER_ROW and not PER_COL
    KL_COLS: tl.constexpr = (p_kl is not None) and PER_COL
    KL_ROWS: tl.constexpr = (p_kl is not None) and PER_ROW

    if p_key is not None:
        seed, offset = key_of_call(
            p_key, p_device_key, key_on_device, seed, offset, i_walker + i_range == 0
        )

    if KL_TOTAL or KL_COLS:
        b_kl_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
    if MEAN_OVER != "none":
        b_mu_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
        b_logvar_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
    of_mean_sum = tl.zeros([], DTYPE)
    if KL_ROWS and SPLIT_COLS:
        p_rows = p_scratch + rows_at

    first_row = i_range * rows_per_range
    end_tile = n_tiles if WALKS else i_walker + 1
    for i_tile in range(i_walker, end_tile, n_walkers if WALKS else 1):
        col = i_tile * BLOCK_COLS
        o_col = col + tl.arange(0, BLOCK_COLS)
        m_col = o_col < width
        if EVENT_COLS > 0:
            b_rows = rows_of_columns(o_col, inner, beside, B, D)
            m_col = b_rows > 0
        if SHARED:
            b_prior_mean, b_prior = prior_columns(
                p_prior_mean, p_prior_scale, o_col, m_col, inner,
                prior_mean_outer, prior_mean_inner, prior_scale_outer, prior_scale_inner,
                IDLE, SPLIT_EVENT, UNIT, DTYPE,
            )  # fmt: skip
            b_prior_mean, b_prior = b_prior_mean[None, :], b_prior[None, :]
            b_prior_root = ROOT(b_prior)
        if WALKS and KL_ROWS:
            tl.debug_barrier()  # each thread reads what others have left of the tile before
        for row in range(first_row, first_row + rows_per_range, BLOCK_ROWS):
            o_row = row + tl.arange(0, BLOCK_ROWS)
            m_row = o_row < B
            m_tile = m_row[:, None] & m_col[None, :]
            if EVENT_COLS > 0:
                m_tile = o_row[:, None] < b_rows[None, :]
            o_mu = offsets(o_row, o_col, inner, mu_row, mu_outer, mu_inner, SPLIT_EVENT, UNIT)
            o_scale = offsets(
                o_row, o_col, inner, scale_row, scale_outer, scale_inner, SPLIT_EVENT, UNIT
            )
            b_mu = tl.load(p_mu + o_mu, m_tile, 0.0).to(DTYPE)
            b_scale = tl.load(p_scale + o_scale, m_tile, IDLE).to(DTYPE)
            if p_prior_mean is None:
                b_prior, b_far = None, b_mu
            else:
                if not SHARED:
                    b_prior_mean, b_prior = prior_tile(
                        p_prior_mean, p_prior_scale, o_row, o_col, m_tile, inner,
                        prior_mean_row, prior_mean_outer, prior_mean_inner,
                        prior_scale_row, prior_scale_outer, prior_scale_inner,
                        IDLE, SPLIT_EVENT, UNIT, DTYPE,
                    )  # fmt: skip
                    b_prior_root = ROOT(b_prior)
            b_logvar, b_std, _, b_phi = TERMS(b_scale, b_prior, m_tile, lo, hi, CLAMP)
            if p_prior_mean is not None:
                b_far = (b_mu - b_prior_mean) * b_prior_root

            b_terms = b_far * b_far + b_phi
            if SHARED:  # rows that are not there are not at the prior
                b_terms = tl.where(m_tile, b_terms, 0.0)
            if KL_TOTAL or KL_COLS:
                b_kl_sum += b_terms
            if MEAN_OVER != "none":
                b_mu_sum += b_mu
                b_logvar_sum += b_logvar

            if p_z is not None:
                o_eps = offsets(
                    o_row, o_col, inner, eps_row, eps_outer, eps_inner, SPLIT_EVENT, UNIT
                )
                b_eps = noise_tile(
                    p_eps, o_eps, m_tile, p_samples, seed, offset, o_row, m_row, col, width,
                    KEYED, CHANNELS, DTYPE, BLOCK_ROWS, BLOCK_COLS,
                )  # fmt: skip
                o_z = offsets(o_row, o_col, inner, z_row, z_outer, z_inner, SPLIT_EVENT, UNIT)
                tl.store(p_z + o_z, fit(b_mu + b_std * b_eps, p_z), m_tile)

            if KL_ROWS:
                b_row_kl = 0.5 * tl.sum(b_terms, axis=1)
                if SPLIT_COLS:
                    p_row = p_rows + o_row.to(tl.int64) * n_walkers + i_walker
                    if WALKS:
                        if i_tile != i_walker:
                            b_row_kl += tl.load(p_row, m_row, 0.0)
                            tl.debug_barrier()  # a sum has several readers and one writer
                    tl.store(p_row, b_row_kl, m_row)
                else:
                    tl.store(p_kl + o_row, b_row_kl, m_row)
        if KL_COLS and not SPLIT_ROWS:
            column_kls(
                p_kl, column_sums(b_kl_sum), kl_denominator, D, inner, col,
                EVENT_COLS, CHANNELS, DTYPE, BLOCK_COLS,
            )  # fmt: skip
            if WALKS:
                b_kl_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
        if MEAN_OVER == "batch" and not SPLIT_ROWS:
            b_mu = column_sums(b_mu_sum)
            b_logvar = column_sums(b_logvar_sum)
            o_prior, m_prior = event_columns(o_col, m_col, D, EVENT_COLS)
            prior = prior_columns(
                p_prior_mean, p_prior_scale, o_prior, m_prior, inner,
                prior_mean_outer, prior_mean_inner, prior_scale_outer, prior_scale_inner,
                IDLE, SPLIT_EVENT, UNIT, DTYPE,
            )  # fmt: skip
            of_mean_sum += event_means(
                p_means, b_mu, b_logvar, prior, B, D, inner, col, m_col, LOGVAR, ROOT,
                EVENT_COLS, CHANNELS, DTYPE, BLOCK_COLS,
            )  # fmt: skip
            if WALKS:
                b_mu_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
                b_logvar_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)

    if KL_ROWS and SPLIT_COLS:
        if arrive(p_counters + 1 + i_range, n_walkers):
            end_row = tl.minimum(first_row + rows_per_range, B)
            finish_rows(p_kl, p_rows, n_walkers, first_row, end_row, DTYPE, ROW_PARTS)

    if KL_TOTAL or KL_COLS or MEAN_OVER != "none":
        kl_sum = tl.zeros([], DTYPE)
        logvar_sum = kl_sum
        if KL_TOTAL:
            kl_sum = tl.sum(b_kl_sum)
        elif KL_COLS and SPLIT_ROWS:
            kl_sum = column_sums(b_kl_sum)
        if MEAN_OVER == "all":
            of_mean_sum = tl.sum(b_mu_sum)
            logvar_sum = tl.sum(b_logvar_sum)
        is_last = True
        if SPLIT_ROWS:
            col = i_walker * BLOCK_COLS
            o_col = col + tl.arange(0, BLOCK_COLS)
            m_col = o_col < width
            mu_sums, logvar_sums = of_mean_sum, logvar_sum
            if MEAN_OVER == "batch":
                mu_sums, logvar_sums = column_sums(b_mu_sum), column_sums(b_logvar_sum)
            p_sums = p_scratch + 3 * (n_walkers + i_walker * lines)
            p_columns = p_scratch + columns_at
            is_last, kl_sum, mu_sums, logvar_sums = add_ranges(
                p_sums, p_columns, p_counters + 1 + n_ranges + i_walker * lines, i_range, n_ranges,
                width, col, m_col, (kl_sum, mu_sums, logvar_sums),
                KL_TOTAL, KL_COLS, MEAN_OVER, BLOCK_COLS,
            )  # fmt: skip
        if is_last:
            if SPLIT_ROWS and KL_COLS:
                column_kls(
                    p_kl, kl_sum, kl_denominator, D, inner, col,
                    EVENT_COLS, CHANNELS, DTYPE, BLOCK_COLS,
                )  # fmt: skip
            if SPLIT_ROWS and MEAN_OVER == "batch":
                o_prior, m_prior = event_columns(o_col, m_col, D, EVENT_COLS)
                prior = prior_columns(
                    p_prior_mean, p_prior_scale, o_prior, m_prior, inner,
                    prior_mean_outer, prior_mean_inner, prior_scale_outer, prior_scale_inner,
                    IDLE, SPLIT_EVENT, UNIT, DTYPE,
                )  # fmt: skip
                of_mean_sum = event_means(
                    p_means, mu_sums, logvar_sums, prior, B, D, inner, col, m_col, LOGVAR, ROOT,
                    EVENT_COLS, CHANNELS, DTYPE, BLOCK_COLS,
                )  # fmt: skip
            elif SPLIT_ROWS:
                of_mean_sum, logvar_sum = mu_sums, logvar_sums
            if KL_TOTAL or MEAN_OVER != "none":
                finish(
                    p_kl if KL_TOTAL else None, p_kl_of_mean, p_means, p_scratch, p_counters,
                    p_prior_mean, p_prior_scale,
                    (kl_sum, of_mean_sum, logvar_sum), kl_denominator, B.to(tl.int64) * D,
                    LOGVAR, ROOT, MEAN_OVER, SPLIT_COLS, DTYPE,
                )  # fmt: skip
