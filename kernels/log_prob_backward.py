"""The backward kernel of a sample with its log densities (the derivation is in ``log_prob``)."""

import triton
import triton.language as tl

from .finish import add_ranges, store_event_sums
from .forms import inside, reciprocal
from .philox import noise_tile
from .prior import prior_columns, prior_tile
from .reduction import column_sums
from .tile import columns, fit, load, offsets, program, strides


@triton.jit(
    do_not_specialize=[
        "B", "D", "inner", "rows_per_range", "period", "dlog_q_row", "dlog_p_row", "lines",
    ],
    do_not_specialize_on_alignment=[
        "p_dlog_q",
        "p_dlog_p",
        *strides("mu", "scale", "eps", "dz", "dmu", "dscale", "deps"),
        *strides("prior_mean", "prior_scale", "dprior_mean", "dprior_scale"),
    ],
)  # fmt: skip
def log_prob_backward_kernel(
    p_mu,  # [B, D]
    p_scale,  # [B, D], in the form of TERMS
    p_eps,  # [B, D], or None: drawn in forward, drawn again here
    p_prior_mean,  # [B, D] or, if SHARED, [D]; None as is its scale: N(0, I)
    p_prior_scale,
    p_dz,  # [B, D] or None
    p_dlog_q,  # [B] or None
    p_dlog_p,  # [B] or None
    p_key,  # int64[2]: the noise key that forward used
    p_samples,  # what philox.noise_of_rows says, or None
    p_dmu,  # [B, D], or None: not wanted
    p_dscale,  # [B, D], or None
    p_deps,  # [B, D], or None
    p_dprior_mean,  # [B, D] or, if SHARED, [D]; or None
    p_dprior_scale,
    p_scratch,  # of DTYPE, laid out as Scratch says; None where a program has all rows
    p_counters,  # int32 [tiles, lines], zero between launches
    lo: tl.float64,  # bounds on logvar, if CLAMP
    hi: tl.float64,
    B,
    D,  # in UNITs, like inner, and the row and outer strides
    inner,
    rows_per_range,
    period,  # rows of one draw, if REPEATED
    dlog_q_row,
    dlog_p_row,
    lines,  # as Scratch has them
    columns_at,
    mu_row, mu_outer, mu_inner,
    scale_row, scale_outer, scale_inner,
    eps_row, eps_outer, eps_inner,
    dz_row, dz_outer, dz_inner,
    dmu_row, dmu_outer, dmu_inner,
    dscale_row, dscale_outer, dscale_inner,
    deps_row, deps_outer, deps_inner,
    prior_mean_row, prior_mean_outer, prior_mean_inner,  # None where there is no prior
    prior_scale_row, prior_scale_outer, prior_scale_inner,
    dprior_mean_row, dprior_mean_outer, dprior_mean_inner,
    dprior_scale_row, dprior_scale_outer, dprior_scale_inner,
    PATH: tl.constexpr,  # log q holds its parameters
    IDLE: tl.constexpr,  # of the scale: what forms.py has
    LOGVAR: tl.constexpr,
    ROOT: tl.constexpr,
    TERMS: tl.constexpr,
    OF_STD: tl.constexpr,
    OF_LOGVAR: tl.constexpr,
    CLAMP: tl.constexpr,  # logvar is bounded
    SHARED: tl.constexpr,  # the prior is all samples'
    KEYED: tl.constexpr,  # p_samples are keys
    REPEATED: tl.constexpr,  # mu, the scale and a prior for each sample are those of one draw
    SPLIT_ROWS: tl.constexpr,  # its gradients are wanted, and there are several row ranges
    SPLIT_EVENT: tl.constexpr,
    UNIT: tl.constexpr,  # columns
    CHANNELS: tl.constexpr,  # the order of columns
    WIDE: tl.constexpr,  # int64 offsets
    DTYPE: tl.constexpr,  # of the computation: tl.float32, tl.float64
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The gradients."""
    D = columns(D, UNIT, WIDE)
    inner = CHANNELS if CHANNELS > 1 else columns(inner, UNIT, WIDE)
    col = program(0, WIDE) * BLOCK_COLS
    o_col = col + tl.arange(0, BLOCK_COLS)
    m_col = o_col < D
    seed, offset = 0, 0
    if p_key is not None:
        seed, offset = tl.load(p_key), tl.load(p_key + 1)
    # Where nothing reaches z, an infinite slope would make NaN of zeros.
    HAS_Z: tl.constexpr = p_dz is not None or p_dlog_p is not None or PATH
    OF_PRIOR: tl.constexpr = p_dprior_mean is not None or p_dprior_scale is not None
    HAS_SUMS: tl.constexpr = SHARED and OF_PRIOR
    if SHARED:
        prior = prior_columns(
            p_prior_mean, p_prior_scale, o_col, m_col, inner,
            prior_mean_outer, prior_mean_inner, prior_scale_outer, prior_scale_inner,
            IDLE, SPLIT_EVENT, UNIT, DTYPE,
        )  # fmt: skip
        b_prior_mean, b_root = prior[0][None, :], ROOT(prior[1][None, :])
    if HAS_SUMS:
        b_dmean_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
        b_dprior_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
    first_row = program(1, WIDE) * rows_per_range
    for row in range(first_row, first_row + rows_per_range, BLOCK_ROWS):
        o_row = row + tl.arange(0, BLOCK_ROWS)
        m_row = o_row < B
        m_tile = m_row[:, None] & m_col[None, :]
        o_own = o_row % period if REPEATED else o_row
        o_mu = offsets(o_own, o_col, inner, mu_row, mu_outer, mu_inner, SPLIT_EVENT, UNIT)
        o_scale = offsets(
            o_own, o_col, inner, scale_row, scale_outer, scale_inner, SPLIT_EVENT, UNIT
        )
        o_eps = offsets(o_row, o_col, inner, eps_row, eps_outer, eps_inner, SPLIT_EVENT, UNIT)
        b_scale = load(p_scale, o_scale, m_tile, IDLE, DTYPE)
        _, b_std, _, _ = TERMS(b_scale, None, None, lo, hi, CLAMP)
        b_eps = noise_tile(
            p_eps, o_eps, m_tile, p_samples, seed, offset, o_row, m_row, col, D,
            KEYED, CHANNELS, DTYPE, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip
        b_dz = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
        if p_dz is not None:
            o_dz = offsets(o_row, o_col, inner, dz_row, dz_outer, dz_inner, SPLIT_EVENT, UNIT)
            b_dz += load(p_dz, o_dz, m_tile, 0.0, DTYPE)
        if p_dlog_p is not None:
            b_dp = load(p_dlog_p, o_row * dlog_p_row, m_row, 0.0, DTYPE)[:, None]
            b_far = load(p_mu, o_mu, m_tile, 0.0, DTYPE) + b_std * b_eps
            if p_prior_mean is None:
                b_pull = b_dp * b_far
            else:
                if not SHARED:
                    b_prior_mean, b_prior = prior_tile(
                        p_prior_mean, p_prior_scale, o_own, o_col, m_tile, inner,
                        prior_mean_row, prior_mean_outer, prior_mean_inner,
                        prior_scale_row, prior_scale_outer, prior_scale_inner,
                        IDLE, SPLIT_EVENT, UNIT, DTYPE,
                    )  # fmt: skip
                    b_root = ROOT(b_prior)
                b_far = (b_far - b_prior_mean) * b_root
                b_pull = b_dp * (b_far * b_root)
            b_dz -= b_pull
        if p_dlog_q is not None:
            b_dq = load(p_dlog_q, o_row * dlog_q_row, m_row, 0.0, DTYPE)[:, None]
            if PATH:
                b_dz -= b_dq * (b_eps * reciprocal(b_std))

        if p_dmu is not None:
            o_dmu = offsets(o_row, o_col, inner, dmu_row, dmu_outer, dmu_inner, SPLIT_EVENT, UNIT)
            tl.store(p_dmu + o_dmu, fit(b_dz, p_dmu), m_tile)
        if p_dscale is not None:
            b_dscale = b_dz
            if HAS_Z:
                b_dscale = b_dz * (OF_STD(b_std) * b_eps)
            if p_dlog_q is not None and not PATH:
                b_dscale -= OF_LOGVAR(b_dq, reciprocal(b_std))
            b_dscale = 0.5 * b_dscale
            if CLAMP:
                b_dscale = tl.where(inside(LOGVAR(b_scale), lo, hi), b_dscale, 0.0)
            o_dscale = offsets(
                o_row, o_col, inner, dscale_row, dscale_outer, dscale_inner, SPLIT_EVENT, UNIT
            )
            tl.store(p_dscale + o_dscale, fit(b_dscale, p_dscale), m_tile)
        if p_deps is not None:
            b_deps = b_dz
            if HAS_Z:
                b_deps = b_dz * b_std
            if p_dlog_q is not None and not PATH:
                b_deps -= b_dq * b_eps
            o_deps = offsets(
                o_row, o_col, inner, deps_row, deps_outer, deps_inner, SPLIT_EVENT, UNIT
            )
            tl.store(p_deps + o_deps, fit(b_deps, p_deps), m_tile)

        if OF_PRIOR:
            b_dprior = OF_LOGVAR(b_dp * (b_far * b_far - 1.0), b_root)
            if SHARED:
                b_dmean_sum += tl.where(m_tile, b_pull, 0.0)
                b_dprior_sum += tl.where(m_tile, b_dprior, 0.0)
            if p_dprior_mean is not None and not SHARED:
                o_dprior = offsets(
                    o_row, o_col, inner, dprior_mean_row, dprior_mean_outer, dprior_mean_inner,
                    SPLIT_EVENT, UNIT,
                )  # fmt: skip
                tl.store(p_dprior_mean + o_dprior, fit(b_pull, p_dprior_mean), m_tile)
            if p_dprior_scale is not None and not SHARED:
                o_dprior = offsets(
                    o_row, o_col, inner, dprior_scale_row, dprior_scale_outer, dprior_scale_inner,
                    SPLIT_EVENT, UNIT,
                )  # fmt: skip
                tl.store(p_dprior_scale + o_dprior, fit(0.5 * b_dprior, p_dprior_scale), m_tile)

    if HAS_SUMS:
        mean_sum, scale_sum = column_sums(b_dmean_sum), column_sums(b_dprior_sum)
        is_last = True
        if SPLIT_ROWS:
            is_last, _, mean_sum, scale_sum = add_ranges(
                p_scratch, p_scratch + columns_at, p_counters + tl.program_id(0) * lines,
                program(1, WIDE), tl.num_programs(1), D, col, m_col,
                (0.0, mean_sum, scale_sum), False, False, "batch", BLOCK_COLS, True,
            )  # fmt: skip
        if is_last:
            store_event_sums(p_dprior_mean, mean_sum, D, inner, col, 0, CHANNELS, BLOCK_COLS)
            store_event_sums(
                p_dprior_scale, 0.5 * scale_sum, D, inner, col, 0, CHANNELS, BLOCK_COLS
            )
