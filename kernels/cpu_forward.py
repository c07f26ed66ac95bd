"""CPU code: z, kl and kl_of_mean in one pass; the twin of ``forward`` (the formulas are there)."""

from numba import njit

from .cpu_blocks import (
    ALL,
    BATCH,
    BLOCK,
    CLAMPED,
    DENOMINATOR,
    MEAN_OVER,
    MORE,
    PER_ROW,
    TILES,
    WORKERS,
    accumulate,
    block,
    clamped,
    copy,
    counts,
    geometry,
    next_pieces,
    noise,
    operand,
    shape_of,
    total,
)
from .cpu_math import JIT, KERNEL, exp_terms
from .cpu_memory import array_at, deliver, fetch_add, source, target, write
from .cpu_team import on_team

WIDTH = 256  # column sums are kept for about so many columns, several rows side by side


@njit(**JIT)
def sample_and_kl(mu, logvar, eps, z, twice_kl):
    for i in range(len(mu)):
        std, _, phi = exp_terms(logvar[i])
        z[i] = mu[i] + std * eps[i]
        twice_kl[i] = mu[i] * mu[i] + phi


@njit(**JIT)
def add_rows(sums, values):
    """Column sums of values that come in rows as long as `sums`."""
    width = len(sums)
    start = 0
    while start + 4 * width <= len(values):
        a, b = values[start : start + width], values[start + width : start + 2 * width]
        start += 2 * width
        c, d = values[start : start + width], values[start + width : start + 2 * width]
        start += 2 * width
        for j in range(width):
            sums[j] += (float(a[j]) + float(b[j])) + (float(c[j]) + float(d[j]))
    while start < len(values):
        accumulate(sums, values[start : min(start + width, len(values))])
        start += width


@njit(**JIT)
def fold(sums, cols):
    """Sums of rows side by side into the first `cols`."""
    rows = len(sums) // cols
    while rows > 1:
        half = rows // 2
        accumulate(sums, sums[(rows - half) * cols : rows * cols])
        rows -= half


@njit(**JIT)
def write_halves(address, first, twice_kl):
    """The KLs of rows of one column each."""
    half = twice_kl.dtype.type(0.5)
    for i in range(len(twice_kl)):
        write(address, first + i, half * twice_kl[i])


@njit(**JIT)
def finish_columns(work, sum_mu, sum_logvar, B, D, col, means):
    """The means of one tile's columns, and twice their share of kl_of_mean."""
    n = len(sum_mu)
    b_mu, b_logvar, twice_kl = block(work, 0, n), block(work, 1, n), block(work, 2, n)
    for i in range(n):
        b_mu[i] = sum_mu[i] / B
        b_logvar[i] = sum_logvar[i] / B
        write(means, col + i, b_mu[i])
        write(means, D + col + i, b_logvar[i])
    sample_and_kl(b_mu, b_logvar, b_mu, block(work, 3, n), twice_kl)
    return total(twice_kl)


@njit(**JIT)
def divided(plan, shared):
    """What workers share: sums of each piece, sums of each row, sums of each column."""
    shape = shape_of(plan)
    n_tiles, n_ranges = counts(shape)
    pieces, at = n_tiles * n_ranges, TILES + n_tiles
    sums = shared[at : at + 3 * pieces].reshape(3, pieces)
    row_sums = shared[at + 3 * pieces :]  # [tiles, B] if kl is per row and there are several
    columns = row_sums[n_tiles * shape[0] if plan[PER_ROW] != 0 and n_tiles > 1 else 0 :]
    return sums, row_sums, columns  # columns: [ranges, 2, D] if there are several ranges


@njit(**JIT)
def finish(works, plan, shared, kl, kl_of_mean, means):
    """All pieces are done: add their sums, in order."""
    dtype = works.dtype.type
    B, D, _, _, _ = shape_of(plan)
    n_tiles, _ = counts(shape_of(plan))
    sums, row_sums, _ = divided(plan, shared)
    if kl != 0 and plan[PER_ROW] == 0:
        write(kl, 0, dtype(0.5 * total(sums[0]) / plan[DENOMINATOR]))
    if kl != 0 and plan[PER_ROW] != 0 and n_tiles > 1:
        for row in range(B):
            row_sum = 0.0
            for i_tile in range(n_tiles):
                row_sum += row_sums[i_tile * B + row]
            write(kl, row, dtype(0.5 * row_sum))
    if plan[MEAN_OVER] == BATCH:
        write(kl_of_mean, 0, dtype(0.5 * total(sums[1, :n_tiles])))
    if plan[MEAN_OVER] == ALL:
        mean_mu = dtype(total(sums[1]) / (float(B) * D))
        mean_logvar = dtype(total(sums[2]) / (float(B) * D))
        write(means, 0, mean_mu)
        write(means, 1, mean_logvar)
        phi = exp_terms(mean_logvar)[2]
        write(kl_of_mean, 0, dtype(0.5 * (float(mean_mu) * float(mean_mu) + phi)))


@njit(**JIT)
def walk(works, numbers, plan, shared, mu, logvar, eps, z, kl, means, seed, offset):
    """Pieces until none is left."""
    shape = shape_of(plan)
    B, D, inner, _, _ = shape
    mean_over, per_row = plan[MEAN_OVER], plan[PER_ROW] != 0
    t_mu, t_logvar, t_eps, t_z = (
        operand(plan, 0, mu), operand(plan, 1, logvar), operand(plan, 2, eps), operand(plan, 3, z)
    )  # fmt: skip
    n_tiles, n_ranges = counts(shape)
    counters = shared.ctypes.data
    sums, row_sums, columns = divided(plan, shared)
    work = works[fetch_add(counters, WORKERS)]
    more = block(work, MORE, 0).ctypes.data
    b_eps = block(work, 2, BLOCK)
    dtype = works.dtype.type
    lo, hi = dtype(numbers[0]), dtype(numbers[1])
    while True:
        first, end = next_pieces(plan, counters)
        if first == end:
            break
        for piece in range(first, end):
            col, cols, block_rows, first_row, end_row, i_tile, i_range = geometry(shape, piece)
            kl_sum = mu_sum = logvar_sum = 0.0
            width = cols * max(min(WIDTH // cols, block_rows), 1)
            sum_mu, sum_logvar = array_at(more, 0.0, width), array_at(more + 8 * BLOCK, 0.0, width)
            sum_mu[:], sum_logvar[:] = 0.0, 0.0
            for row in range(first_row, end_row, block_rows):
                rows = min(block_rows, end_row - row)
                n = rows * cols
                place = (D, inner, row, rows, col, cols)
                if eps != 0:
                    b_eps = source(t_eps, place, block(work, 2, n))
                elif z != 0:
                    noise(work, (seed, offset), D, place, b_eps)
                b_mu = source(t_mu, place, block(work, 0, n))
                b_logvar = source(t_logvar, place, block(work, 1, n))
                if plan[CLAMPED] != 0:
                    clamped(b_logvar, lo, hi, block(work, 3, n))
                    b_logvar = block(work, 3, n)
                b_z, twice_kl = target(t_z, place, block(work, 4, n)), block(work, 5, n)
                sample_and_kl(b_mu, b_logvar, b_eps, b_z, twice_kl)
                deliver(t_z, place, b_z)
                if kl != 0 and not per_row:
                    kl_sum += total(twice_kl)
                elif kl != 0 and D == 1:
                    write_halves(kl, row, twice_kl)
                elif kl != 0:
                    for r in range(rows):
                        row_sum = total(twice_kl[r * cols : (r + 1) * cols])
                        if n_tiles == 1:
                            write(kl, row + r, dtype(0.5 * row_sum))
                        else:
                            row_sums[i_tile * B + row + r] = row_sum
                if mean_over == BATCH:
                    add_rows(sum_mu, b_mu)
                    add_rows(sum_logvar, b_logvar)
                elif mean_over == ALL:
                    mu_sum += total(b_mu)
                    logvar_sum += total(b_logvar)

            sums[0, piece] = kl_sum
            if mean_over == ALL:
                sums[1, piece], sums[2, piece] = mu_sum, logvar_sum
            elif mean_over == BATCH:
                fold(sum_mu, cols)
                fold(sum_logvar, cols)
                sum_mu, sum_logvar = sum_mu[:cols], sum_logvar[:cols]
                is_last = n_ranges == 1
                if not is_last:
                    here = 2 * i_range * D + col
                    copy(sum_mu, columns[here : here + cols])
                    copy(sum_logvar, columns[here + D : here + D + cols])
                    is_last = fetch_add(counters, TILES + i_tile) == n_ranges - 1
                    if is_last:
                        sum_mu[:], sum_logvar[:] = 0.0, 0.0
                        for here in range(col, 2 * n_ranges * D, 2 * D):
                            accumulate(sum_mu, columns[here : here + cols])
                            accumulate(sum_logvar, columns[here + D : here + D + cols])
                if is_last:
                    sums[1, i_tile] = finish_columns(work, sum_mu, sum_logvar, B, D, col, means)


@njit(**KERNEL)
def forward(
    parallel, threads,  # of on_team
    works,  # each worker's own: BUFFERS blocks of the computation's dtype
    numbers,  # (lo, hi) of clamp, float64
    plan,  # int64: what is fixed about the call, see cpu_blocks
    shared,  # float64 zeros: counters (as int64) and sums of all workers
    mu, logvar, eps, z,  # addresses of tensors; eps absent: drawn here
    kl, kl_of_mean, means, state,  # addresses; state int64[2]: the key, for backward
    seed, offset,
):  # fmt: skip
    """z, kl and kl_of_mean. An address of 0: absent or not wanted."""
    if state != 0:
        write(state, 0, seed)
        write(state, 1, offset)
    arguments = (works, numbers, plan, shared, mu, logvar, eps, z, kl, means, seed, offset)
    on_team(parallel, threads, walk, arguments)
    on_team(0, 1, finish, (works, plan, shared, kl, kl_of_mean, means))
