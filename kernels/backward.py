"""The backward kernel: gradients of z, kl and kl_of_mean in one launch.

Upstream: dz [B, D], g_b (of kl: per sample, or one over a denominator), h (of kl_of_mean). With
s = exp(l / 2), the means m', l' that forward kept, and n = B ("batch") or B D ("all"):

    z = m + s eps                  dz/dm = 1            dz/dl = s eps / 2       dz/deps = s
    k(m, l) = (m^2 + phi(l)) / 2   dk/dm = m            dk/dl = (e^l - 1) / 2
    kl_of_mean = sum k(m', l')     d/dm = m' / n        d/dl = (e^l' - 1) / (2 n)

    dmu     = dz + g_b m + h m' / n
    dlogvar = (dz s eps + g_b (e^l - 1) + h (e^l' - 1) / n) / 2,  dscale: ``forms``
    deps    = dz s

Saved by forward: mu, the scale (and eps if given) by reference, the noise key, the means. Reads mu,
scale, dz (and eps); writes what is asked for. A pointer that is None drops its term or output.
"""

import triton
import triton.language as tl

from .forms import inside
from .gaussian import divide, expm1
from .philox import normal_tile
from .tile import (
    columns,
    event_tile,
    fit,
    in_columns,
    offsets,
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
    ],
    # autograd hands in scalars at any address; a variant for aligned ones would gain nothing.
    do_not_specialize_on_alignment=[
        "p_dkl",
        "p_dkl_of_mean",
        *strides("mu", "scale", "eps", "dz", "dmu", "dscale", "deps"),
    ],
)
def backward_kernel(
    p_mu,  # [B, D]
    p_scale,  # [B, D], in the form of TERMS
    p_eps,  # [B, D], or None: drawn in forward, drawn again here
    p_dz,  # [B, D] or None
    p_dkl,  # [B] if PER_ROW, else [], or None
    p_dkl_of_mean,  # [], or None
    p_key,  # int64[2]: the noise key that forward used
    p_means,  # [2, D] for "batch", [2] for "all"
    p_dmu,  # [B, D], or None: not wanted
    p_dscale,  # [B, D], or None
    p_deps,  # [B, D], or None
    lo: tl.float64,  # bounds on logvar, if CLAMP
    hi: tl.float64,
    B,
    D,  # in UNITs, like inner, and the row and outer strides
    inner,
    beside,  # samples in a row, if BESIDE
    rows_per_range,
    kl_denominator,
    dkl_row,
    mu_row, mu_outer, mu_inner,
    scale_row, scale_outer, scale_inner,
    eps_row, eps_outer, eps_inner,
    dz_row, dz_outer, dz_inner,
    dmu_row, dmu_outer, dmu_inner,
    dscale_row, dscale_outer, dscale_inner,
    deps_row, deps_outer, deps_inner,
    PER_ROW: tl.constexpr,
    MEAN_OVER: tl.constexpr,  # "none", "batch", "all"
    IDLE: tl.constexpr,  # of the scale: what forms.py has
    LOGVAR: tl.constexpr,
    TERMS: tl.constexpr,
    OF_STD: tl.constexpr,
    OF_LOGVAR: tl.constexpr,
    CLAMP: tl.constexpr,  # logvar is bounded
    BESIDE: tl.constexpr,  # samples are beside each other
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
    if BESIDE:
        width = beside * inner
        b_rows = rows_of_columns(o_col, inner, beside, B, D)
    DRAW: tl.constexpr = p_dz is not None and p_dscale is not None and p_eps is None

    if DRAW:
        seed = tl.load(p_key)
        offset = tl.load(p_key + 1)
    if p_dkl is not None and not PER_ROW:
        b_dkl = divide(tl.load(p_dkl).to(DTYPE), kl_denominator.to(DTYPE))
    # What kl_of_mean sends to a column does not depend on the row.
    if p_dkl_of_mean is not None:
        h = tl.load(p_dkl_of_mean).to(DTYPE)
        if MEAN_OVER == "batch":
            o_place, m_place = event_tile(col, D, CHANNELS, BLOCK_COLS)
            if BESIDE:
                o_place, m_place = o_col % inner, b_rows > 0
            b_mean_mu = tl.load(p_means + o_place, m_place, 0.0)
            b_mean_logvar = tl.load(p_means + D + o_place, m_place, 0.0)
            b_mean_mu = in_columns(b_mean_mu, CHANNELS, BLOCK_COLS)
            b_mean_logvar = in_columns(b_mean_logvar, CHANNELS, BLOCK_COLS)
            h = divide(h, B.to(DTYPE))
        else:
            b_mean_mu = tl.zeros([BLOCK_COLS], DTYPE) + tl.load(p_means)
            b_mean_logvar = tl.zeros([BLOCK_COLS], DTYPE) + tl.load(p_means + 1)
            h = divide(h, (B.to(tl.int64) * D).to(DTYPE))
        b_dmu_of_mean = (h * b_mean_mu)[None, :]
        b_dlogvar_of_mean = (h * expm1(b_mean_logvar))[None, :]

    first_row = program(1, WIDE) * rows_per_range
    for row in range(first_row, first_row + rows_per_range, BLOCK_ROWS):
        o_row = row + tl.arange(0, BLOCK_ROWS)
        m_row = o_row < B
        m_tile = m_row[:, None] & m_col[None, :]
        if BESIDE:
            m_tile = o_row[:, None] < b_rows[None, :]
        if p_dkl is not None and PER_ROW:
            b_dkl = tl.load(p_dkl + o_row * dkl_row, m_row, 0.0).to(DTYPE)[:, None]
        if p_dz is not None:
            o_dz = offsets(o_row, o_col, inner, dz_row, dz_outer, dz_inner, SPLIT_EVENT, UNIT)
            b_dz = tl.load(p_dz + o_dz, m_tile, 0.0).to(DTYPE)

        if p_dmu is not None:
            b_dmu = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
            if p_dz is not None:
                b_dmu += b_dz
            if p_dkl is not None:
                o_mu = offsets(o_row, o_col, inner, mu_row, mu_outer, mu_inner, SPLIT_EVENT, UNIT)
                b_dmu += b_dkl * tl.load(p_mu + o_mu, m_tile, 0.0).to(DTYPE)
            if p_dkl_of_mean is not None:
                b_dmu += b_dmu_of_mean
            o_dmu = offsets(o_row, o_col, inner, dmu_row, dmu_outer, dmu_inner, SPLIT_EVENT, UNIT)
            tl.store(p_dmu + o_dmu, fit(b_dmu, p_dmu), m_tile)

        if p_dscale is not None or p_deps is not None:
            o_scale = offsets(
                o_row, o_col, inner, scale_row, scale_outer, scale_inner, SPLIT_EVENT, UNIT
            )
            b_scale = tl.load(p_scale + o_scale, m_tile, IDLE).to(DTYPE)
            _, b_std, b_expm1, _ = TERMS(b_scale, None, lo, hi, CLAMP)

        if p_dscale is not None:
            b_dscale = tl.zeros([BLOCK_ROWS, BLOCK_COLS], DTYPE)
            if p_dz is not None:
                if DRAW:
                    b_eps = normal_tile(
                        seed, offset, o_row, col, width, CHANNELS, DTYPE, BLOCK_ROWS, BLOCK_COLS
                    )
                else:
                    o_eps = offsets(
                        o_row, o_col, inner, eps_row, eps_outer, eps_inner, SPLIT_EVENT, UNIT
                    )
                    b_eps = tl.load(p_eps + o_eps, m_tile, 0.0).to(DTYPE)
                b_dscale += b_dz * (OF_STD(b_std) * b_eps)
            # One slope for both: where it is infinite, infinities of two signs would be NaN.
            if p_dkl is not None:
                b_dlogvar = b_dkl * b_expm1
                if p_dkl_of_mean is not None:
                    b_dlogvar += b_dlogvar_of_mean
                b_dscale += OF_LOGVAR(b_dlogvar, b_std)
            elif p_dkl_of_mean is not None:
                b_dscale += OF_LOGVAR(b_dlogvar_of_mean, b_std)
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
