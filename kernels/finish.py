"""Device code: what becomes of the sums of forward's programs; and where in scratch they are."""

from typing import NamedTuple

import triton
import triton.language as tl

from .gaussian import divide, kl_terms
from .prior import from_prior
from .reduction import (
    GROUP,
    arrive,
    column_sums,
    group_of,
    load_group,
    partial_sums,
    row_sums,
    sum_of_group,
    sum_scalars,
)
from .tile import event_tile, fit, in_event, of_one_event

ROW_BLOCK = tl.constexpr(512)  # partial KLs of rows that are added at once


@triton.constexpr_function
def column_count(mean_over, per_col):
    """Sums of each column: of mu and logvar, and of twice the KL."""
    return 2 * (mean_over == "batch") + per_col


@triton.jit
def finish_rows(
    p_out, p_rows, count, first_row, end_row, DTYPE: tl.constexpr, ROW_PARTS: tl.constexpr
):
    """Sums of rows of `count` partial sums each."""
    ROWS: tl.constexpr = ROW_BLOCK // ROW_PARTS
    for row in range(first_row, end_row, ROWS):
        o_row = row + tl.arange(0, ROWS)
        m_row = o_row < end_row
        tl.store(
            p_out + o_row, row_sums(p_rows, count, o_row, m_row, DTYPE, ROWS, ROW_PARTS), m_row
        )


@triton.jit
def add_ranges(
    p_sums, p_columns, p_counters, i, n, width, col, m_col, sums,
    KL_TOTAL: tl.constexpr, KL_COLS: tl.constexpr, MEAN_OVER: tl.constexpr, COLS: tl.constexpr,
    BACK: tl.constexpr = False,
):  # fmt: skip
    """Sums of the i-th of n row ranges, added up in rounds; (whether it was the last, the sums).

    p_sums, p_columns, p_counters: of one walker, as ``add_group`` has them, each round's after the
    round's before.
    """
    COUNT: tl.constexpr = column_count(MEAN_OVER, KL_COLS)
    kl_sum, mu_sum, logvar_sum = sums
    line = 0 * n
    # True in either form, since n > 1; with the other one ptxas spills in the one kernel, or takes
    # more registers in the other.
    is_last = True if BACK else n > 1
    while is_last & (n > 1):  # of pointers a loop may carry none: AMD's compiler fails
        is_last, kl_sum, mu_sum, logvar_sum = add_group(
            p_sums + 3 * line, p_columns + COUNT * line.to(tl.int64) * width, p_counters + line,
            i, n, width, col, m_col, (kl_sum, mu_sum, logvar_sum),
            KL_TOTAL, KL_COLS, MEAN_OVER, COLS,
        )  # fmt: skip
        line += n
        i = i // GROUP
        n = tl.cdiv(n, GROUP)
    return is_last, kl_sum, mu_sum, logvar_sum


@triton.jit
def add_group(
    p_sums,  # [3, n]: of twice the KL, and for "all" of mu and logvar
    p_columns,  # [n, column_count, width]
    p_counters,  # of each group
    i, n, width, col, m_col, sums,
    KL_TOTAL: tl.constexpr, KL_COLS: tl.constexpr, MEAN_OVER: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Leave sums as the i-th of n; (whether it was the last of its group, the group's sums)."""
    kl_sum, mu_sum, logvar_sum = sums
    COUNT: tl.constexpr = column_count(MEAN_OVER, KL_COLS)
    first, count = group_of(i, n)
    p_first = p_columns + COUNT * first.to(tl.int64) * width + col
    p_own = p_first + COUNT * (i - first).to(tl.int64) * width + tl.arange(0, COLS)
    if KL_COLS:
        tl.store(p_own + (COUNT - 1) * width, kl_sum, m_col)
    if KL_TOTAL:
        tl.store(p_sums + i, kl_sum)
    if MEAN_OVER == "all":
        tl.store(p_sums + n + i, mu_sum)
        tl.store(p_sums + 2 * n + i, logvar_sum)
    if MEAN_OVER == "batch":
        tl.store(p_own, mu_sum, m_col)
        tl.store(p_own + width, logvar_sum, m_col)
    is_last = arrive(p_counters + i // GROUP, count)
    if is_last:
        if KL_COLS:
            p_kl = p_first + (COUNT - 1) * width
            kl_sum = column_sums(load_group(p_kl, COUNT * width, count, m_col, COLS))
        if KL_TOTAL:
            kl_sum = sum_of_group(p_sums + first, count)
        if MEAN_OVER == "all":
            mu_sum = sum_of_group(p_sums + n + first, count)
            logvar_sum = sum_of_group(p_sums + 2 * n + first, count)
        if MEAN_OVER == "batch":
            b_mu = load_group(p_first, COUNT * width, count, m_col, COLS)
            b_logvar = load_group(p_first + width, COUNT * width, count, m_col, COLS)
            mu_sum, logvar_sum = column_sums(b_mu), column_sums(b_logvar)
    return is_last, kl_sum, mu_sum, logvar_sum


@triton.jit
def column_means(
    p_means, mu_sum, logvar_sum, prior, B, D, col, m_col,
    LOGVAR: tl.constexpr, ROOT: tl.constexpr,
    CHANNELS: tl.constexpr, DTYPE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Of one column tile; twice its share of kl_of_mean. prior: its mean and scale, or None."""
    b_mean_mu = divide(mu_sum, B.to(DTYPE))
    b_mean_logvar = divide(logvar_sum, B.to(DTYPE))
    o_place, m_place = event_tile(col, D, CHANNELS, COLS)
    tl.store(p_means + o_place, in_event(b_mean_mu, CHANNELS, COLS), m_place)
    tl.store(p_means + D + o_place, in_event(b_mean_logvar, CHANNELS, COLS), m_place)
    b_low = None
    if prior is not None:
        b_mean_mu, b_mean_logvar, b_low, _ = from_prior(
            b_mean_mu, b_mean_logvar, prior[0], prior[1], LOGVAR, ROOT
        )
    return tl.sum(tl.where(m_col, kl_terms(b_mean_mu, b_mean_logvar, b_low), 0.0))


@triton.jit
def event_means(
    p_means, mu_sum, logvar_sum, prior, B, D, inner, col, m_col,
    LOGVAR: tl.constexpr, ROOT: tl.constexpr,
    EVENT_COLS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``column_means``, of samples beside each other, too; prior: as wide as an event then."""
    if EVENT_COLS > 0:
        mu_sum = of_one_event(mu_sum, inner, COLS, EVENT_COLS)
        logvar_sum = of_one_event(logvar_sum, inner, COLS, EVENT_COLS)
        m_col = tl.arange(0, EVENT_COLS) < D
        share = column_means(
            p_means, mu_sum, logvar_sum, prior, B, D, 0, m_col, LOGVAR, ROOT, 1, DTYPE, EVENT_COLS
        )
    else:
        share = column_means(
            p_means, mu_sum, logvar_sum, prior, B, D, col, m_col, LOGVAR, ROOT,
            CHANNELS, DTYPE, COLS,
        )  # fmt: skip
    return share


@triton.jit
def store_event_sums(
    p_sums, b_sums, D, inner, col,
    EVENT_COLS: tl.constexpr, CHANNELS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Sums of the columns of a tile, to [D]; None: not wanted."""
    if p_sums is not None:
        if EVENT_COLS > 0:
            b_sums = of_one_event(b_sums, inner, COLS, EVENT_COLS)
            o_place = tl.arange(0, EVENT_COLS)
            m_place = o_place < D
        else:
            b_sums = in_event(b_sums, CHANNELS, COLS)
            o_place, m_place = event_tile(col, D, CHANNELS, COLS)
        tl.store(p_sums + o_place, fit(b_sums, p_sums), m_place)


@triton.jit
def column_kls(
    p_kl, kl_sum, kl_denominator, D, inner, col,
    EVENT_COLS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write the KL of each column of a tile, of sums of twice the KL."""
    b_kl = divide(0.5 * kl_sum, kl_denominator.to(DTYPE))
    store_event_sums(p_kl, b_kl, D, inner, col, EVENT_COLS, CHANNELS, COLS)


@triton.jit
def finish(
    p_kl,  # [] or None
    p_kl_of_mean,  # [] or None
    p_means,  # [2] here; MEAN_OVER = "all" only
    p_sums,  # [3, walkers]
    p_counter,
    p_prior_mean,  # one number each here, or None
    p_prior_scale,
    sums,  # the walker's: of twice the KL; "batch": of twice kl_of_mean; "all": of mu, logvar
    kl_denominator,
    element_count,
    LOGVAR: tl.constexpr,
    ROOT: tl.constexpr,
    MEAN_OVER: tl.constexpr,
    SPLIT_COLS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """With the last walker, write the scalars."""
    kl_sum, mu_sum, logvar_sum = sums
    is_last = True
    if SPLIT_COLS:
        i = tl.program_id(0)
        n = tl.num_programs(0)
        if p_kl is not None:
            tl.store(p_sums + i, kl_sum)
        if MEAN_OVER != "none":
            tl.store(p_sums + n + i, mu_sum)
        if MEAN_OVER == "all":
            tl.store(p_sums + 2 * n + i, logvar_sum)
        is_last = arrive(p_counter, n)
    if is_last:
        if SPLIT_COLS:
            if p_kl is not None:
                kl_sum = sum_scalars(p_sums, n, DTYPE)
            if MEAN_OVER != "none":
                mu_sum = sum_scalars(p_sums + n, n, DTYPE)
            if MEAN_OVER == "all":
                logvar_sum = sum_scalars(p_sums + 2 * n, n, DTYPE)
        if p_kl is not None:
            tl.store(p_kl, divide(0.5 * kl_sum, kl_denominator.to(DTYPE)))
        if MEAN_OVER == "batch":
            tl.store(p_kl_of_mean, 0.5 * mu_sum)
        if MEAN_OVER == "all":
            mean_mu = divide(mu_sum, element_count.to(DTYPE))
            mean_logvar = divide(logvar_sum, element_count.to(DTYPE))
            tl.store(p_means, mean_mu)
            tl.store(p_means + 1, mean_logvar)
            low = None
            if p_prior_mean is not None:
                mean_mu, mean_logvar, low, _ = from_prior(
                    mean_mu, mean_logvar, tl.load(p_prior_mean).to(DTYPE),
                    tl.load(p_prior_scale).to(DTYPE), LOGVAR, ROOT,
                )  # fmt: skip
            tl.store(p_kl_of_mean, 0.5 * kl_terms(mean_mu, mean_logvar, low))


class Scratch(NamedTuple):
    """Where parts of scratch begin, and its size, for the host. First are scalars, [3, walkers];
    of each walker, those of its ranges [3, ranges], then of each round of groups [3, groups].
    """

    lines: int  # partial sums of a walker
    columns: int  # column sums [ranges, column_count, width], then of each round of groups
    rows: int  # [B, walkers], of KLs of rows
    size: int


def scratch_parts(walkers, ranges, column_sums, row_sums):
    """Of a grid. column_sums: the width of a row times column_count; row_sums: B where PER_ROW;
    else 0.
    """
    if walkers == ranges == 1:
        return Scratch(0, 0, 0, 0)
    lines = partial_sums(ranges)
    # Triton learns from a number that 16 divides that vectors may begin there.
    columns = -(-3 * walkers * (1 + lines) // 16) * 16
    rows = -(-(columns + lines * column_sums) // 16) * 16
    return Scratch(lines, columns, rows, rows + walkers * row_sums)


def row_parts(walkers):
    """How many partial KLs of a row are added at once."""
    return min(triton.next_power_of_2(walkers), 256)


def counter_count(walkers, ranges):
    """Counters: of all walkers, of each range's, of each walker's groups in every round."""
    return 1 + ranges + walkers * partial_sums(ranges)
