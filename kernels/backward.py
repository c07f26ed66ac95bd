"""The backward kernel: gradients of z, kl and kl_of_mean in one launch.

Upstream: dz [B, D], g_b (of kl: per sample, or per element of an event or one for all, over a
denominator), h (of kl_of_mean). With s = exp(l / 2), the means m', l' that forward kept, and n = B
("batch") or B D ("all"):

    z = m + s eps                  dz/dm = 1            dz/dl = s eps / 2       dz/deps = s
    k(m, l) = (m^2 + phi(l)) / 2   dk/dm = m            dk/dl = (e^l - 1) / 2
    kl_of_mean = sum k(m', l')     d/dm = m' / n        d/dl = (e^l' - 1) / (2 n)

    dmu     = dz + g_b m + h m' / n
    dlogvar = (dz s eps + g_b (e^l - 1) + h (e^l' - 1) / n) / 2,  dscale: ``forms``
    deps    = dz s

Against a prior k, and what it sends to the prior, is what ``prior`` says. What it sends to a prior
that all samples share is summed over them by the last program of each column tile to arrive.

Saved by forward: mu, the scale (eps, a prior if given) by reference, the noise key, the means.
Reads mu, scale, dz (and those); writes what is asked for. A pointer that is None drops its term or
output.
"""

import triton
import triton.language as tl

from .finish import add_ranges, store_event_sums
from .forms import inside, reciprocal
from .gaussian import divide, expm1
from .philox import noise_tile
from .prior import from_prior, prior_columns, prior_tile
from .reduction import column_sums
from .tile import (
    columns,
    fit,
    in_columns,
    offsets,
    places_of_tile,
    program,
    rows_of_columns,
    strides,
)


@triton.jit(
    do_not_specialize=[
        "B",
        "D",
        "inner",
        "beside",
        "kl_denominator",
        "rows_per_range",
        "dkl_row",
        "lines",
    ],
    # autograd hands in scalars at any address; a variant for aligned ones would gain nothing.
    do_not_specialize_on_alignment=[
        "p_dkl",
        "p_dkl_of_mean",
        *strides("mu", "scale", "eps", "dz", "dmu", "dscale", "deps"),
        *strides("prior_mean", "prior_scale", "dprior_mean", "dprior_scale"),
    ],
)
def backward_kernel(
    p_mu,  # [B, D]
    p_scale,  # [B, D], in the form of TERMS
    p_eps,  # [B, D], or None: drawn in forward, drawn again here
    p_prior_mean,  # [B, D] or, if SHARED, [D]; None as is its scale: N(0, I)
    p_prior_scale,
    p_dz,  # [B, D] or None
    p_dkl,  # [B] if PER_ROW, [D] if PER_COL, else [], or None
    p_dkl_of_mean,  # [], or None
    p_key,  # int64[2]: the noise key that forward used
    p_means,  # [2, D] for "batch", [2] for "all"
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
    beside,  # samples in a row, if EVENT_COLS
    rows_per_range,
    kl_denominator,
    dkl_row,  # stride of what is not one number
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
    PER_ROW: tl.constexpr,
    PER_COL: tl.constexpr,
    MEAN_OVER: tl.constexpr,  # "none", "batch", "all"
    IDLE: tl.constexpr,  # of the scale: what forms.py has
    LOGVAR: tl.constexpr,
    ROOT: tl.constexpr,
    TERMS: tl.constexpr,
    OF_STD: tl.constexpr,
    OF_LOGVAR: tl.constexpr,
    CLAMP: tl.constexpr,  # logvar is bounded
    SHARED: tl.constexpr,  # the prior is all samples'
    KEYED: tl.constexpr,  # p_samples are keys
    SPLIT_ROWS: tl.constexpr,  # its gradients are wanted, and there are several row ranges
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
    col = program(0, WIDE) * BLOCK_COLS
    o_col = col + tl.arange(0, BLOCK_COLS)
    m_col = o_col < D
    width = D
    if EVENT_COLS > 0:
        width = beside * inner
        b_rows = rows_of_columns(o_col, inner, beside, B, D)
        m_col = b_rows > 0
    seed, offset = 0, 0
    if p_dz is not None and p_dscale is not None and p_eps is None:
        seed, offset = tl.load(p_key), tl.load(p_key + 1)
    if p_dkl is not None and PER_COL:
        o_place, m_place = places_of_tile(
            o_col, m_col, col, D, inner, EVENT_COLS, CHANNELS, BLOCK_COLS
        )
        b_dkl = tl.load(p_dkl + o_place * dkl_row, m_place, 0.0).to(DTYPE)
        b_dkl = divide(in_columns(b_dkl, CHANNELS, BLOCK_COLS), kl_denominator.to(DTYPE))[None, :]
    elif p_dkl is not None and not PER_ROW:
        b_dkl = divide(tl.load(p_dkl).to(DTYPE), kl_denominator.to(DTYPE))
    if SHARED:
        prior = prior_columns(
            p_prior_mean, p_prior_scale, o_col, m_col, inner,
            prior_mean_outer, prior_mean_inner, prior_scale_outer, prior_scale_inner,
            IDLE, SPLIT_EVENT, UNIT, DTYPE,
        )  # fmt: skip
        b_prior_mean, b_prior = prior[0][None, :], prior[1][None, :]
        b_prior_root = ROOT(b_prior)
    # What kl_of_mean sends to a column does not depend on the row.
    if p_dkl_of_mean is not None:
        h = tl.load(p_dkl_of_mean).to(DTYPE)
        if MEAN_OVER == "batch":
            o_place, m_place = places_of_tile(
                o_col, m_col, col, D, inner, EVENT_COLS, CHANNELS, BLOCK_COLS
            )
            b_mean_mu = tl.load(p_means + o_place, m_place, 0.0)
            b_mean_logvar = tl.load(p_means + D + o_place, m_place, 0.0)
            b_mean_mu = in_columns(b_mean_mu, CHANNELS, BLOCK_COLS)
            b_mean_logvar = in_columns(b_mean_logvar, CHANNELS, BLOCK_COLS)
            h = divide(h, B.to(DTYPE))
        else:
            b_mean_mu = tl.zeros([BLOCK_COLS], DTYPE) + tl.load(p_means)
            b_mean_logvar = tl.zeros([BLOCK_COLS], DTYPE) + tl.load(p_means + 1)
            h = divide(h, (B.to(tl.int64) * D).to(DTYPE))
        if p_prior_mean is not None:
            b_mean_far, b_mean_logvar, b_mean_low, b_mean_root = from_prior(
                b_mean_mu, b_mean_logvar, prior[0], prior[1], LOGVAR, ROOT
            )
            b_mean_mu = b_mean_far * b_mean_root
            b_mean_expm1 = expm1(b_mean_logvar, b_mean_low)
            b_dprior_of_mean = h * (b_mean_far * b_mean_far + b_mean_expm1)
        else:
            b_mean_expm1 = expm1(b_mean_logvar)
        b_dmu_of_mean = (h * b_mean_mu)[None, :]
        b_dlogvar_of_mean = (h * b_mean_expm1)[None, :]

    OF_PRIOR: tl.constexpr = p_dprior_mean is not None or p_dprior_scale is not None
    HAS_SUMS: tl.constexpr = SHARED and OF_PRIOR and p_dkl is not None
    if HAS_SUMS:
        b_dmean_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
        b_dprior_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)

    first_row = program(1, WIDE) * rows_per_range
    for row in range(first_row, first_row + rows_per_range, BLOCK_ROWS):
        o_row = row + tl.arange(0, BLOCK_ROWS)
        m_row = o_row < B
        m_tile = m_row[:, None] & m_col[None, :]
        if EVENT_COLS > 0:
            m_tile = o_row[:, None] < b_rows[None, :]
        if p_dkl is not None and PER_ROW:
            b_dkl = tl.load(p_dkl + o_row * dkl_row, m_row, 0.0).to(DTYPE)[:, None]
        if p_dz is not None:
            o_dz = offsets(o_row, o_col, inner, dz_row, dz_outer, dz_inner, SPLIT_EVENT, UNIT)
            b_dz = tl.load(p_dz + o_dz, m_tile, 0.0).to(DTYPE)
        if p_prior_mean is None:
            b_prior = None
        else:
            if not SHARED:
                b_prior_mean, b_prior = prior_tile(
                    p_prior_mean, p_prior_scale, o_row, o_col, m_tile, inner,
                    prior_mean_row, prior_mean_outer, prior_mean_inner,
                    prior_scale_row, prior_scale_outer, prior_scale_inner,
                    IDLE, SPLIT_EVENT, UNIT, DTYPE,
                )  # fmt: skip
                b_prior_root = ROOT(b_prior)
            o_mu = offsets(o_row, o_col, inner, mu_row, mu_outer, mu_inner, SPLIT_EVENT, UNIT)
            b_mu = tl.load(p_mu + o_mu, m_tile, 0.0).to(DTYPE)
            b_far = (b_mu - b_prior_mean) * b_prior_root

        if p_dmu is not None:
            b_dmu = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
            if p_dz is not None:
                b_dmu += b_dz
            if p_dkl is not None and p_prior_mean is not None:
                b_dmu += b_dkl * (b_far * b_prior_root)
            elif p_dkl is not None:
                o_mu = offsets(o_row, o_col, inner, mu_row, mu_outer, mu_inner, SPLIT_EVENT, UNIT)
                b_dmu += b_dkl * tl.load(p_mu + o_mu, m_tile, 0.0).to(DTYPE)
            if p_dkl_of_mean is not None:
                b_dmu += b_dmu_of_mean
            o_dmu = offsets(o_row, o_col, inner, dmu_row, dmu_outer, dmu_inner, SPLIT_EVENT, UNIT)
            tl.store(p_dmu + o_dmu, fit(b_dmu, p_dmu), m_tile)

        if p_dscale is not None or p_deps is not None or p_dprior_scale is not None:
            o_scale = offsets(
                o_row, o_col, inner, scale_row, scale_outer, scale_inner, SPLIT_EVENT, UNIT
            )
            b_scale = tl.load(p_scale + o_scale, m_tile, IDLE).to(DTYPE)
            _, b_std, b_expm1, _ = TERMS(b_scale, b_prior, None, lo, hi, CLAMP)

        if p_dscale is not None:
            b_dscale = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
            if p_dz is not None:
                o_eps = offsets(
                    o_row, o_col, inner, eps_row, eps_outer, eps_inner, SPLIT_EVENT, UNIT
                )
                b_eps = noise_tile(
                    p_eps, o_eps, m_tile, p_samples, seed, offset, o_row, m_row, col, width,
                    KEYED, CHANNELS, DTYPE, BLOCK_ROWS, BLOCK_COLS,
                )  # fmt: skip
                b_dscale += b_dz * (OF_STD(b_std) * b_eps)
            b_root = reciprocal(b_std)
            # One slope for both: where it is infinite, infinities of two signs would be NaN.
            if p_dkl is not None:
                b_dlogvar = b_dkl * b_expm1
                if p_dkl_of_mean is not None:
                    b_dlogvar += b_dlogvar_of_mean
                b_dscale += OF_LOGVAR(b_dlogvar, b_root)
            elif p_dkl_of_mean is not None:
                b_dscale += OF_LOGVAR(b_dlogvar_of_mean, b_root)
            b_dscale = 0.5 * b_dscale
            if CLAMP:
                b_dscale = tl.where(inside(LOGVAR(b_scale), lo, hi), b_dscale, 0.0)
            o_dscale = offsets(
                o_row, o_col, inner, dscale_row, dscale_outer, dscale_inner, SPLIT_EVENT, UNIT
            )
            tl.store(p_dscale + o_dscale, fit(b_dscale, p_dscale), m_tile)

        if p_deps is not None:
            o_deps = offsets(
                o_row, o_col, inner, deps_row, deps_outer, deps_inner, SPLIT_EVENT, UNIT
            )
            tl.store(p_deps + o_deps, fit(b_dz * b_std, p_deps), m_tile)

        if HAS_SUMS:
            b_dmean_sum += tl.where(m_tile, b_dkl * (b_far * b_prior_root), 0.0)
            if p_dprior_scale is not None:
                b_values = OF_LOGVAR(b_far * b_far + b_expm1, b_prior_root)
                b_dprior_sum += tl.where(m_tile, b_dkl * b_values, 0.0)
        if p_dprior_mean is not None and not SHARED:
            o_dprior = offsets(
                o_row, o_col, inner, dprior_mean_row, dprior_mean_outer, dprior_mean_inner,
                SPLIT_EVENT, UNIT,
            )  # fmt: skip
            b_dprior = -b_dkl * (b_far * b_prior_root)
            tl.store(p_dprior_mean + o_dprior, fit(b_dprior, p_dprior_mean), m_tile)
        if p_dprior_scale is not None and not SHARED:
            o_dprior = offsets(
                o_row, o_col, inner, dprior_scale_row, dprior_scale_outer, dprior_scale_inner,
                SPLIT_EVENT, UNIT,
            )  # fmt: skip
            b_dprior = -0.5 * (b_dkl * OF_LOGVAR(b_far * b_far + b_expm1, b_prior_root))
            tl.store(p_dprior_scale + o_dprior, fit(b_dprior, p_dprior_scale), m_tile)

    if SHARED and OF_PRIOR:
        mean_sum = tl.zeros([BLOCK_COLS], DTYPE)
        scale_sum = mean_sum
        if HAS_SUMS:
            mean_sum, scale_sum = column_sums(b_dmean_sum), column_sums(b_dprior_sum)
        is_last = True
        if SPLIT_ROWS:
            is_last, _, mean_sum, scale_sum = add_ranges(
                p_scratch, p_scratch + columns_at, p_counters + tl.program_id(0) * lines,
                program(1, WIDE), tl.num_programs(1), width, col, o_col < width,
                (0.0, mean_sum, scale_sum), False, False, "batch", BLOCK_COLS, True,
            )  # fmt: skip
        if is_last:
            if p_dkl_of_mean is not None:  # each column's, as often as it has rows
                b_of_mean, b_of_scale = h * b_mean_mu, OF_LOGVAR(b_dprior_of_mean, b_mean_root)
                if EVENT_COLS > 0:
                    mean_sum += tl.where(m_col, b_rows.to(DTYPE) * b_of_mean, 0.0)
                    scale_sum += tl.where(m_col, b_rows.to(DTYPE) * b_of_scale, 0.0)
                else:
                    mean_sum += B.to(DTYPE) * b_of_mean
                    scale_sum += B.to(DTYPE) * b_of_scale
            store_event_sums(
                p_dprior_mean, -mean_sum, D, inner, col, EVENT_COLS, CHANNELS, BLOCK_COLS
            )
            store_event_sums(
                p_dprior_scale, -0.5 * scale_sum, D, inner, col, EVENT_COLS, CHANNELS, BLOCK_COLS
            )
