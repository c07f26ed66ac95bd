"""CPU code: z, kl and kl_of_mean in one pass; the twin of ``forward`` (the formulas are there)."""

import numpy as np
from numba import njit

from .cpu_blocks import (
    ALL,
    BATCH,
    BLOCK,
    CHUNK,
    CLAMPED,
    DENOMINATOR,
    MEAN_OVER,
    PER_ROW,
    accumulate,
    clamp,
    counts,
    geometry,
    operand,
    shape_of,
    square_plus,
    std_and_phi,
    total,
    workspace,
)
from .cpu_math import JIT, exp_terms
from .cpu_memory import approach, fetch_add, read_block, write, write_block
from .cpu_noise import normals


@njit(**JIT)
def shift_and_scale(mu, std, eps):
    """eps becomes z."""
    for i in range(len(eps)):
        eps[i] = mu[i] + std[i] * eps[i]


@njit(**JIT)
def add_columns(sums, values, is_first):
    """Column sums of a block, its rows still apart."""
    if is_first:
        for i in range(len(values)):
            sums[i] = values[i]
    else:
        accumulate(sums, values)


@njit(**JIT)
def fold(sums, rows, cols):
    """Sums of `rows` rows into the first one."""
    while rows > 1:
        half = rows // 2
        accumulate(sums[: half * cols], sums[(rows - half) * cols : rows * cols])
        rows -= half


@njit(**JIT)
def finish_columns(work, sum_mu, sum_logvar, B, D, col, means):
    """The means of one tile's columns, and twice their share of kl_of_mean."""
    n = len(sum_mu)
    b_mu, b_logvar, b_std, b_phi = work[0, :n], work[1, :n], work[2, :n], work[3, :n]
    for i in range(n):
        b_mu[i] = sum_mu[i] / B
        b_logvar[i] = sum_logvar[i] / B
        write(means, col + i, b_mu[i])
        write(means, D + col + i, b_logvar[i])
    std_and_phi(b_logvar, b_std, b_phi)
    square_plus(b_mu, b_phi)
    return total(b_phi)


@njit(**JIT)
def finish(dtype, plan, sums, row_sums, kl, kl_of_mean, means):
    """All pieces are done: add their sums, in order."""
    shape = shape_of(plan)
    B, D = shape[0], shape[1]
    n_tiles, n_ranges = counts(shape)
    pieces = n_tiles * n_ranges
    if kl != 0 and plan[PER_ROW] == 0:
        write(kl, 0, dtype(0.5 * total(sums[0, :pieces]) / plan[DENOMINATOR]))
    if kl != 0 and plan[PER_ROW] != 0 and n_tiles > 1:
        for row in range(B):
            row_sum = 0.0
            for i_tile in range(n_tiles):
                row_sum += row_sums[i_tile * B + row]
            write(kl, row, dtype(0.5 * row_sum))
    if plan[MEAN_OVER] == BATCH:
        write(kl_of_mean, 0, dtype(0.5 * total(sums[1, :n_tiles])))
    if plan[MEAN_OVER] == ALL:
        mean_mu = dtype(total(sums[1, :pieces]) / (float(B) * D))
        mean_logvar = dtype(total(sums[2, :pieces]) / (float(B) * D))
        write(means, 0, mean_mu)
        write(means, 1, mean_logvar)
        phi = exp_terms(mean_logvar)[2]
        write(kl_of_mean, 0, dtype(0.5 * (float(mean_mu) * float(mean_mu) + phi)))


@njit(**JIT)
def forward(
    numbers,  # (lo, hi) of clamp, in the dtype of the computation
    plan,  # int64: what is fixed about the call, see cpu_blocks
    shared,  # float64 zeros, see scratch_size: counters (as int64) and sums of all workers
    mu, logvar, eps, z,  # addresses of tensors; eps absent: drawn here
    kl, kl_of_mean, means, state,  # addresses; state int64[2]: the key, for backward
    seed, offset,
):  # fmt: skip
    """z, kl and kl_of_mean: pieces until none is left. An address of 0: absent or not wanted."""
    shape = shape_of(plan)
    B, D, inner, _, _ = shape
    mean_over, per_row, clamped = plan[MEAN_OVER], plan[PER_ROW] != 0, plan[CLAMPED] != 0
    t_mu, t_logvar, t_eps, t_z = (
        operand(plan, 0, mu), operand(plan, 1, logvar), operand(plan, 2, eps), operand(plan, 3, z)
    )  # fmt: skip
    n_tiles, n_ranges = counts(shape)
    n_pieces, chunk = n_tiles * n_ranges, plan[CHUNK]
    n_chunks = (n_pieces + chunk - 1) // chunk
    # Counters: chunks taken, chunks done, and ranges done of each tile.
    counters, at = shared.ctypes.data, 2 + n_tiles
    sums = shared[at : at + 3 * n_pieces].reshape(3, n_pieces)
    at += 3 * n_pieces
    row_sums = shared[at:]
    if kl != 0 and per_row and n_tiles > 1:
        at += n_tiles * B
    columns = shared[at:]  # [ranges, 2, D] if there are several ranges

    work, words, lanes = workspace(numbers)
    columns_of_piece = np.empty((2, BLOCK if mean_over == BATCH else 0), np.float64)
    dtype, lo, hi = numbers.dtype.type, numbers[0], numbers[1]
    while True:
        i_chunk = fetch_add(counters, 0)
        if i_chunk >= n_chunks:
            break
        if i_chunk == 0 and state != 0:
            write(state, 0, seed)
            write(state, 1, offset)
        for piece in range(i_chunk * chunk, min((i_chunk + 1) * chunk, n_pieces)):
            col, cols, block_rows, first_row, end_row, i_tile, i_range = geometry(shape, piece)
            kl_sum = mu_sum = logvar_sum = 0.0
            for row in range(first_row, end_row, block_rows):
                rows = min(block_rows, end_row - row)
                n = rows * cols
                b_mu, b_logvar, b_eps = work[0, :n], work[1, :n], work[2, :n]
                b_std, b_phi = work[3, :n], work[4, :n]
                approach(t_z, D, inner, row, rows, col, cols, True)
                read_block(t_mu, D, inner, row, rows, col, cols, b_mu)
                read_block(t_logvar, D, inner, row, rows, col, cols, b_logvar)
                ahead, col_ahead = row + rows, col
                if ahead == end_row:
                    ahead, col_ahead = first_row, col + cols
                approach(t_mu, D, inner, ahead, rows, col_ahead, cols, False)
                if clamped:
                    clamp(b_logvar, lo, hi)
                std_and_phi(b_logvar, b_std, b_phi)
                approach(t_logvar, D, inner, ahead, rows, col_ahead, cols, False)
                if z != 0:
                    if eps != 0:
                        read_block(t_eps, D, inner, row, rows, col, cols, b_eps)
                    else:
                        group = row * ((D + 3) // 4) + col // 4
                        normals(seed, offset, group, rows, cols, words, lanes, work[2])
                    shift_and_scale(b_mu, b_std, b_eps)
                    write_block(t_z, D, inner, row, rows, col, cols, b_eps)
                if kl != 0:
                    square_plus(b_mu, b_phi)
                    if per_row:
                        for r in range(rows):
                            row_sum = total(b_phi[r * cols : (r + 1) * cols])
                            if n_tiles == 1:
                                write(kl, row + r, dtype(0.5 * row_sum))
                            else:
                                row_sums[i_tile * B + row + r] = row_sum
                    else:
                        kl_sum += total(b_phi)
                if mean_over == BATCH:
                    add_columns(columns_of_piece[0], b_mu, row == first_row)
                    add_columns(columns_of_piece[1], b_logvar, row == first_row)
                elif mean_over == ALL:
                    mu_sum += total(b_mu)
                    logvar_sum += total(b_logvar)

            sums[0, piece] = kl_sum
            if mean_over == ALL:
                sums[1, piece], sums[2, piece] = mu_sum, logvar_sum
            elif mean_over == BATCH:
                sum_mu, sum_logvar = columns_of_piece[0, :cols], columns_of_piece[1, :cols]
                fold(columns_of_piece[0], block_rows, cols)
                fold(columns_of_piece[1], block_rows, cols)
                is_last = n_ranges == 1
                if not is_last:
                    here = 2 * i_range * D + col
                    columns[here : here + cols] = sum_mu
                    columns[here + D : here + D + cols] = sum_logvar
                    is_last = fetch_add(counters, 2 + i_tile) == n_ranges - 1
                    if is_last:
                        sum_mu[:], sum_logvar[:] = 0.0, 0.0
                        for here in range(col, 2 * n_ranges * D, 2 * D):
                            accumulate(sum_mu, columns[here : here + cols])
                            accumulate(sum_logvar, columns[here + D : here + D + cols])
                if is_last:
                    sums[1, i_tile] = finish_columns(work, sum_mu, sum_logvar, B, D, col, means)
        if fetch_add(counters, 1) == n_chunks - 1:
            finish(dtype, plan, sums, row_sums, kl, kl_of_mean, means)
