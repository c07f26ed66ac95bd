"""The forward kernel of a sample with its log densities; the derivation of both.

With s = exp(l / 2), l the posterior's logvar, ' the prior's (N(0, I) where there is none), and eps
of ``philox``, for each sample b in nats:

    z     = m + s eps
    log q = -sum_j (ln 2 pi + l + eps^2) / 2                     of the noise: z may have rounded it
    log p = -sum_j (ln 2 pi + l' + f^2) / 2,  f = (z - m') e^(-l'/2)          of z before rounding

Upstream: dz [B, D], a (of log q) and c (of log p) per sample. What reaches z is

    t = dz - c f e^(-l'/2)                                     and along the path (PATH) - a eps / s

    dm = t    dl = (t s eps - a) / 2    deps = t s - a eps     without terms in a along the path
    dm' = c f e^(-l'/2)                 dl' = c (f^2 - 1) / 2

The path's are those of Roeder, Wu & Duvenaud 2017: log q holds its parameters. dscale: ``forms``.

Forward reads mu, the scale (eps, a prior if given) and writes z; backward reads those and dz, and
writes what is asked for. Grid (column tiles, row ranges); a pointer that is None drops its term or
output. Sums over columns are finished by the last program of a row range, those of a prior that
samples share by the last of a column tile.
"""

import triton
import triton.language as tl

from .finish import finish_rows
from .philox import key_of_call, noise_tile
from .prior import prior_columns, prior_tile
from .reduction import arrive
from .tile import columns, fit, load, offsets, program, strides

LN_2_PI = tl.constexpr(1.8378770664093453)


@triton.jit(
    do_not_specialize=[
        "seed", "offset", "key_on_device", "B", "D", "inner", "rows_per_range", "period",
    ],
    do_not_specialize_on_alignment=strides("mu", "scale", "eps", "z", "prior_mean", "prior_scale"),
)  # fmt: skip
def log_prob_forward_kernel(
    p_mu,  # [B, D]
    p_scale,  # [B, D], in the form of TERMS
    p_eps,  # [B, D], or None: drawn here
    p_prior_mean,  # [B, D] or, if SHARED, [D]; None as is its scale: N(0, I)
    p_prior_scale,
    p_z,  # [B, D]
    p_log_q,  # [B]
    p_log_p,  # [B]
    p_key,  # int64[2]: the noise key used, for backward; None where nothing is drawn
    p_device_key,  # int64[2]: the noise key, read if key_on_device; else any pointer
    p_samples,  # what philox.noise_of_rows says, or None
    p_scratch,  # of DTYPE, [2, B, tiles]; None where there is one tile
    p_counters,  # int32, one for each range, zero between launches
    seed: tl.int64,
    offset: tl.int64,
    key_on_device,
    lo: tl.float64,  # bounds on logvar, if CLAMP
    hi: tl.float64,
    B,
    D,  # in UNITs, like inner, and the row and outer strides
    inner,
    rows_per_range,
    period,  # rows of one draw, if REPEATED
    mu_row, mu_outer, mu_inner,
    scale_row, scale_outer, scale_inner,
    eps_row, eps_outer, eps_inner,
    z_row, z_outer, z_inner,
    prior_mean_row, prior_mean_outer, prior_mean_inner,  # None where there is no prior
    prior_scale_row, prior_scale_outer, prior_scale_inner,
    SPLIT_COLS: tl.constexpr,  # there are several tiles
    ROW_PARTS: tl.constexpr,  # row_parts of them
    IDLE: tl.constexpr,  # of the scale: what forms.py has
    LOGVAR: tl.constexpr,
    ROOT: tl.constexpr,
    TERMS: tl.constexpr,
    CLAMP: tl.constexpr,  # logvar is bounded
    SHARED: tl.constexpr,  # the prior is all samples'
    KEYED: tl.constexpr,  # p_samples are keys
    REPEATED: tl.constexpr,  # mu, the scale and a prior for each sample are those of one draw
    SPLIT_EVENT: tl.constexpr,
    UNIT: tl.constexpr,  # columns
    CHANNELS: tl.constexpr,  # the order of columns
    WIDE: tl.constexpr,  # int64 offsets
    DTYPE: tl.constexpr,  # of the computation: tl.float32, tl.float64
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """z, log q and log p."""
    D = columns(D, UNIT, WIDE)
    inner = CHANNELS if CHANNELS > 1 else columns(inner, UNIT, WIDE)
    i_tile, i_range, n_tiles = program(0, WIDE), program(1, WIDE), tl.num_programs(0)
    if p_key is not None:
        is_first = i_tile + i_range == 0
        seed, offset = key_of_call(p_key, p_device_key, key_on_device, seed, offset, is_first)
    col = i_tile * BLOCK_COLS
    o_col = col + tl.arange(0, BLOCK_COLS)
    m_col = o_col < D
    if SHARED:
        prior = prior_columns(
            p_prior_mean, p_prior_scale, o_col, m_col, inner,
            prior_mean_outer, prior_mean_inner, prior_scale_outer, prior_scale_inner,
            IDLE, SPLIT_EVENT, UNIT, DTYPE,
        )  # fmt: skip
        b_prior_mean, b_prior = prior[0][None, :], prior[1][None, :]
    first_row = i_range * rows_per_range
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
        b_logvar, b_std, _, _ = TERMS(b_scale, None, None, lo, hi, CLAMP)
        b_eps = noise_tile(
            p_eps, o_eps, m_tile, p_samples, seed, offset, o_row, m_row, col, D,
            KEYED, CHANNELS, DTYPE, BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip
        b_z = load(p_mu, o_mu, m_tile, 0.0, DTYPE) + b_std * b_eps
        o_z = offsets(o_row, o_col, inner, z_row, z_outer, z_inner, SPLIT_EVENT, UNIT)
        tl.store(p_z + o_z, fit(b_z, p_z), m_tile)
        if p_prior_mean is None:
            b_p = b_z * b_z + LN_2_PI
        else:
            if not SHARED:
                b_prior_mean, b_prior = prior_tile(
                    p_prior_mean, p_prior_scale, o_own, o_col, m_tile, inner,
                    prior_mean_row, prior_mean_outer, prior_mean_inner,
                    prior_scale_row, prior_scale_outer, prior_scale_inner,
                    IDLE, SPLIT_EVENT, UNIT, DTYPE,
                )  # fmt: skip
            b_far = (b_z - b_prior_mean) * ROOT(b_prior)
            b_p = b_far * b_far + (LOGVAR(b_prior) + LN_2_PI)
        b_q = b_eps * b_eps + (b_logvar + LN_2_PI)
        b_log_q = -0.5 * tl.sum(tl.where(m_tile, b_q, 0.0), axis=1)
        b_log_p = -0.5 * tl.sum(tl.where(m_tile, b_p, 0.0), axis=1)
        if SPLIT_COLS:
            p_row = p_scratch + o_row.to(tl.int64) * n_tiles + i_tile
            tl.store(p_row, b_log_q, m_row)
            tl.store(p_row + B.to(tl.int64) * n_tiles, b_log_p, m_row)
        else:
            tl.store(p_log_q + o_row, b_log_q, m_row)
            tl.store(p_log_p + o_row, b_log_p, m_row)
    if SPLIT_COLS:
        if arrive(p_counters + i_range, n_tiles):
            end_row = tl.minimum(first_row + rows_per_range, B)
            p_of_p = p_scratch + B.to(tl.int64) * n_tiles
            finish_rows(p_log_q, p_scratch, n_tiles, first_row, end_row, DTYPE, ROW_PARTS)
            finish_rows(p_log_p, p_of_p, n_tiles, first_row, end_row, DTYPE, ROW_PARTS)
