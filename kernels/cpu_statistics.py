"""CPU code: column sums over the samples in one pass; the twin of ``statistics`` (see there)."""

import numpy as np
from numba import njit

from .cpu_blocks import (
    BLOCK,
    TILES,
    WORKERS,
    accumulate,
    block,
    copy,
    counts,
    geometry,
    next_pieces,
    operand,
    shape_of,
)
from .cpu_forward import WIDTH, add_rows, fold
from .cpu_math import JIT, KERNEL, exp_terms
from .cpu_memory import fetch_add, source, write
from .cpu_team import on_team

SUMS = 8
#: A worker's memory, in blocks: mu, logvar, what else is summed, the sums, the shifts.
STATISTICS_BUFFERS = 9 + SUMS + 1


# One loop each: LLVM does not vectorise a loop over all of these arrays, which might overlap.


@njit(**JIT)
def mu_terms(mu, shift, distance, square, bad):
    for i in range(len(mu)):
        distance[i] = mu[i] - shift[i]
        square[i] = (mu[i] - shift[i]) * (mu[i] - shift[i])
        bad[i] = 0.0 if abs(mu[i]) < np.inf else 1.0


@njit(**JIT)
def exp_phi(logvar, exp, phi):
    for i in range(len(logvar)):
        std, _, phi[i] = exp_terms(logvar[i])
        exp[i] = std * std


@njit(**JIT)
def logvar_flags(logvar, low, high, bad, outside):
    for i in range(len(logvar)):
        finite = abs(logvar[i]) < np.inf
        bad[i] = 0.0 if finite else 1.0
        outside[i] = 1.0 if finite & ((logvar[i] < low) | (logvar[i] > high)) else 0.0


@njit(**JIT)
def walk(works, numbers, plan, shared, mu, logvar, out):
    """Pieces until none is left."""
    shape = shape_of(plan)
    _, D, inner, _, _ = shape
    t_mu, t_logvar = operand(plan, 0, mu), operand(plan, 1, logvar)
    n_tiles, n_ranges = counts(shape)
    counters = shared.ctypes.data
    columns = shared[TILES + n_tiles :].reshape(n_ranges, SUMS, D)
    work = works[fetch_add(counters, WORKERS)]
    shift = block(work, 9 + SUMS, BLOCK)
    while True:
        first, end = next_pieces(plan, counters)
        if first == end:
            break
        for piece in range(first, end):
            col, cols, block_rows, first_row, end_row, i_tile, i_range = geometry(shape, piece)
            anchor = source(t_mu, (D, inner, 0, 1, col, cols), block(work, 0, cols))
            for start in range(0, block_rows * cols, cols):
                copy(anchor, shift[start : start + cols])
            width = cols * max(min(WIDTH // cols, block_rows), 1)
            sums = block(work, 9, SUMS * BLOCK).reshape(SUMS, BLOCK)[:, :width]
            sums[:] = 0.0
            for row in range(first_row, end_row, block_rows):
                rows = min(block_rows, end_row - row)
                n = rows * cols
                place = (D, inner, row, rows, col, cols)
                b_mu = source(t_mu, place, block(work, 0, n))
                b_logvar = source(t_logvar, place, block(work, 1, n))
                distance, square, exp, phi, bad_mu, bad_logvar, outside = (
                    block(work, 2, n), block(work, 3, n), block(work, 4, n), block(work, 5, n),
                    block(work, 6, n), block(work, 7, n), block(work, 8, n),
                )  # fmt: skip
                mu_terms(b_mu, shift, distance, square, bad_mu)
                exp_phi(b_logvar, exp, phi)
                logvar_flags(b_logvar, numbers[0], numbers[1], bad_logvar, outside)
                add_rows(sums[0], distance)
                add_rows(sums[1], square)
                add_rows(sums[2], b_logvar)
                add_rows(sums[3], exp)
                add_rows(sums[4], phi)
                add_rows(sums[5], bad_mu)
                add_rows(sums[6], bad_logvar)
                add_rows(sums[7], outside)
            for i in range(SUMS):
                fold(sums[i], cols)
                copy(sums[i, :cols], columns[i_range, i, col : col + cols])
            if fetch_add(counters, TILES + i_tile) == n_ranges - 1:
                for i in range(SUMS):
                    total = sums[i, :cols]
                    total[:] = 0.0
                    for r in range(n_ranges):
                        accumulate(total, columns[r, i, col : col + cols])
                    for j in range(cols):
                        write(out, i * D + col + j, total[j])
                for j in range(cols):
                    write(out, SUMS * D + col + j, shift[j])


@njit(**KERNEL)
def statistics(
    parallel, threads,  # of on_team
    works,  # each worker's own: STATISTICS_BUFFERS blocks of float64
    numbers,  # (low, high): logvar is outside
    plan,  # int64: what is fixed about the call, see cpu_blocks
    shared,  # float64 zeros: counters (as int64) and sums of all workers
    mu, logvar, out,  # addresses; out float64[SUMS + 1, D]
):  # fmt: skip
    """Column sums."""
    on_team(parallel, threads, walk, (works, numbers, plan, shared, mu, logvar, out))
