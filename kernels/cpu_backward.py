"""CPU code: the gradients in one pass; the twin of ``backward`` (the derivation is there)."""

import numpy as np
from numba import njit

from .cpu_blocks import (
    BATCH,
    BLOCK,
    CHUNK,
    CLAMPED,
    DENOMINATOR,
    DKL_ROW,
    MEAN_OVER,
    PER_ROW,
    clamp,
    counts,
    geometry,
    operand,
    shape_of,
    std_and_expm1,
    workspace,
)
from .cpu_math import JIT
from .cpu_memory import approach, fetch_add, read, read_block, write_block
from .cpu_noise import normals


@njit(**JIT)
def of_mean_gradients(means, upstream, plan, col, cols, work, of_mu, of_logvar):
    """What kl_of_mean sends to each element of a block: the same for every row."""
    shape = shape_of(plan)
    B, D = shape[0], shape[1]
    by_column = plan[MEAN_OVER] == BATCH
    dtype = of_mu.dtype.type
    zero = dtype(0)
    h = upstream / dtype(B if by_column else float(B) * D)
    b_mu, b_logvar, b_std, b_expm1 = work[0, :cols], work[1, :cols], work[2, :cols], work[3, :cols]
    if by_column:
        for j in range(cols):
            b_mu[j] = read(means, col + j, zero)
            b_logvar[j] = read(means, D + col + j, zero)
    else:
        b_mu[:], b_logvar[:] = read(means, 0, zero), read(means, 1, zero)
    std_and_expm1(b_logvar, b_std, b_expm1)
    for j in range(cols):
        of_mu[j] = h * b_mu[j]
        of_logvar[j] = h * b_expm1[j]
    done = cols
    while done < len(of_mu):
        n = min(done, len(of_mu) - done)
        of_mu[done : done + n] = of_mu[:n]
        of_logvar[done : done + n] = of_logvar[:n]
        done += n


@njit(**JIT)
def mu_gradient(dz, g, mu, of_mean):
    """Over mu."""
    for i in range(len(mu)):
        mu[i] = dz[i] + g[i] * mu[i] + of_mean[i]


@njit(**JIT)
def logvar_gradient(dz, eps, g, expm1, of_mean):
    """Over expm1; dz is dz std here."""
    half = expm1.dtype.type(0.5)
    for i in range(len(expm1)):
        expm1[i] = half * (dz[i] * eps[i] + g[i] * expm1[i] + of_mean[i])


@njit(**JIT)
def zero_outside(logvar, lo, hi, gradient):
    """The gradient of clamp."""
    zero = gradient.dtype.type(0)
    for i in range(len(logvar)):
        inside = (logvar[i] >= lo) & (logvar[i] <= hi)
        gradient[i] = gradient[i] if inside else zero


@njit(**JIT)
def multiply(values, by):
    for i in range(len(values)):
        values[i] *= by[i]


@njit(**JIT)
def backward(
    numbers,  # (lo, hi) of clamp, in the dtype of the computation
    plan,  # int64: what is fixed about the call, see cpu_blocks
    shared,  # float64 zeros [1]: the counter (as int64) of chunks taken
    mu, logvar, eps, dz, dmu, dlogvar, deps,  # addresses; eps absent: drawn in forward, again here
    dkl, dkl_of_mean, means, state,  # addresses
):  # fmt: skip
    """The gradients: pieces until none is left. An address of 0: absent or not wanted."""
    shape = shape_of(plan)
    _, D, inner, _, _ = shape
    per_row, clamped = plan[PER_ROW] != 0, plan[CLAMPED] != 0
    t_mu, t_logvar, t_eps, t_dz = (
        operand(plan, 0, mu), operand(plan, 1, logvar), operand(plan, 2, eps), operand(plan, 3, dz)
    )  # fmt: skip
    t_dmu, t_dlogvar, t_deps = (
        operand(plan, 4, dmu), operand(plan, 5, dlogvar), operand(plan, 6, deps)
    )  # fmt: skip
    n_tiles, n_ranges = counts(shape)
    n_pieces, chunk, counter = n_tiles * n_ranges, plan[CHUNK], shared.ctypes.data

    work, words, lanes = workspace(numbers)
    dtype, zero, lo, hi = numbers.dtype.type, numbers.dtype.type(0), numbers[0], numbers[1]
    # Upstream gradients of each element: of kl, and what kl_of_mean sends to mu and to logvar.
    upstream = np.zeros((3, BLOCK), numbers.dtype)
    if dkl != 0 and not per_row:
        upstream[0, :] = read(dkl, 0, zero) / dtype(plan[DENOMINATOR])
    draws = dz != 0 and dlogvar != 0 and eps == 0
    seed = offset = 0
    if draws:
        seed, offset = read(state, 0, np.int64(0)), read(state, 1, np.int64(0))
    while True:
        i_chunk = fetch_add(counter, 0)
        if i_chunk * chunk >= n_pieces:
            break
        for piece in range(i_chunk * chunk, min((i_chunk + 1) * chunk, n_pieces)):
            col, cols, block_rows, first_row, end_row, _, _ = geometry(shape, piece)
            if dkl_of_mean != 0:
                full = block_rows * cols
                of_mu, of_logvar = upstream[1, :full], upstream[2, :full]
                h = read(dkl_of_mean, 0, zero)
                of_mean_gradients(means, h, plan, col, cols, work, of_mu, of_logvar)
            for row in range(first_row, end_row, block_rows):
                rows = min(block_rows, end_row - row)
                n = rows * cols
                b_mu, b_logvar, b_eps = work[0, :n], work[1, :n], work[2, :n]
                b_std, b_expm1, b_dz = work[3, :n], work[4, :n], work[5, :n]
                b_g = upstream[0, :n]
                ahead, col_ahead = row + rows, col
                if ahead == end_row:
                    ahead, col_ahead = first_row, col + cols
                if dkl != 0 and per_row:
                    for r in range(rows):
                        g = read(dkl, (row + r) * plan[DKL_ROW], zero)
                        b_g[r * cols : (r + 1) * cols] = g
                if dz != 0:
                    read_block(t_dz, D, inner, row, rows, col, cols, b_dz)
                    approach(t_dz, D, inner, ahead, rows, col_ahead, cols, False)
                else:
                    b_dz[:] = zero
                if dmu != 0:
                    if dkl != 0:
                        read_block(t_mu, D, inner, row, rows, col, cols, b_mu)
                    else:
                        b_mu[:] = zero
                    mu_gradient(b_dz, b_g, b_mu, upstream[1])
                    write_block(t_dmu, D, inner, row, rows, col, cols, b_mu)
                if dlogvar == 0 and deps == 0:
                    continue
                approach(t_dlogvar, D, inner, row, rows, col, cols, True)
                read_block(t_logvar, D, inner, row, rows, col, cols, b_logvar)
                if clamped:
                    b_mu[:] = b_logvar
                    clamp(b_logvar, lo, hi)
                std_and_expm1(b_logvar, b_std, b_expm1)
                approach(t_logvar, D, inner, ahead, rows, col_ahead, cols, False)
                if dz != 0:
                    multiply(b_dz, b_std)
                if deps != 0:
                    write_block(t_deps, D, inner, row, rows, col, cols, b_dz)
                if dlogvar == 0:
                    continue
                if draws:
                    group = row * ((D + 3) // 4) + col // 4
                    normals(seed, offset, group, rows, cols, words, lanes, work[2])
                elif dz != 0:
                    read_block(t_eps, D, inner, row, rows, col, cols, b_eps)
                else:
                    b_eps[:] = zero
                if dmu != 0:
                    approach(t_mu, D, inner, ahead, rows, col_ahead, cols, False)
                    approach(t_dmu, D, inner, ahead, rows, col_ahead, cols, True)
                if dkl == 0:
                    b_expm1[:] = zero
                logvar_gradient(b_dz, b_eps, b_g, b_expm1, upstream[2])
                if clamped:
                    zero_outside(b_mu, lo, hi, b_expm1)
                write_block(t_dlogvar, D, inner, row, rows, col, cols, b_expm1)
