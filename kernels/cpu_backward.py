"""CPU code: the gradients in one pass; the twin of ``backward`` (the derivation is there)."""

import numpy as np
from numba import njit

from .cpu_blocks import (
    BATCH,
    BLOCK,
    CLAMPED,
    DENOMINATOR,
    DKL_ROW,
    MEAN_OVER,
    MORE,
    PER_ROW,
    WORKERS,
    block,
    clamped,
    copy,
    geometry,
    next_pieces,
    noise,
    operand,
    shape_of,
)
from .cpu_math import JIT, KERNEL, exp_terms
from .cpu_memory import deliver, fetch_add, read, read_run, source, target
from .cpu_team import on_team


@njit(**JIT)
def gradients(mu, logvar, eps, dz, g, has_dz, has_dkl, of_mu, of_logvar, dmu, dlogvar, deps):
    """g: of kl, for each element; of_mu, of_logvar: what kl_of_mean sends to each."""
    zero, half = g.dtype.type(0), g.dtype.type(0.5)
    for i in range(len(dmu)):
        std, expm1, _ = exp_terms(logvar[i])
        # What is absent is not read, whatever it holds.
        kl_mu = g[i] * mu[i] if has_dkl else zero
        kl_logvar = g[i] * expm1 if has_dkl else zero
        z_mu = dz[i] if has_dz else zero
        z_eps = z_mu * std
        z_logvar = z_eps * eps[i] if has_dz else zero
        dmu[i] = z_mu + kl_mu + of_mu[i]
        dlogvar[i] = half * (z_logvar + kl_logvar) + of_logvar[i]
        deps[i] = z_eps


@njit(**JIT)
def of_mean_gradients(means, h, plan, col, cols, work, g, of_mu, of_logvar):
    """What kl_of_mean sends to each element of a block: h times the gradient of a KL of means.

    It is the same for every row. of_mu and of_logvar are zeros before, g is overwritten.
    """
    shape = shape_of(plan)
    B, D = shape[0], shape[1]
    by_column = plan[MEAN_OVER] == BATCH
    zero = g.dtype.type(0)
    b_mu, b_logvar = block(work, 0, cols), block(work, 1, cols)
    if by_column:
        for j in range(cols):
            b_mu[j] = read(means, col + j, zero)
            b_logvar[j] = read(means, D + col + j, zero)
    else:
        b_mu[:], b_logvar[:] = read(means, 0, zero), read(means, 1, zero)
    g[:cols] = h / g.dtype.type(B if by_column else float(B) * D)
    row_mu, row_logvar = block(work, 2, cols), block(work, 3, cols)
    of_mu[:cols], of_logvar[:cols] = zero, zero
    gradients(
        b_mu, b_logvar, b_mu, b_mu, g, False, True, of_mu, of_logvar,
        row_mu, row_logvar, block(work, 4, cols),
    )  # fmt: skip
    for start in range(0, len(of_mu), cols):
        copy(row_mu, of_mu[start : start + cols])
        copy(row_logvar, of_logvar[start : start + cols])


@njit(**JIT)
def zero_outside(logvar, lo, hi, gradient):
    """The gradient of clamp: 0 at its bounds, too; an infinite one is none."""
    zero = gradient.dtype.type(0)
    open_low, open_high = lo == -np.inf, hi == np.inf
    for i in range(len(logvar)):
        inside = ((logvar[i] > lo) | open_low) & ((logvar[i] < hi) | open_high)
        gradient[i] = gradient[i] if inside else zero


@njit(**JIT)
def walk(
    works, numbers, plan, shared, mu, logvar, eps, dz, dmu, dlogvar, deps, dkl, dkl_of_mean, means,
    state,
):  # fmt: skip
    """Pieces until none is left."""
    shape = shape_of(plan)
    B, D, inner, _, _ = shape
    per_row, has_dz, has_dkl = plan[PER_ROW] != 0, dz != 0, dkl != 0
    t_mu, t_logvar, t_eps, t_dz = (
        operand(plan, 0, mu), operand(plan, 1, logvar), operand(plan, 2, eps), operand(plan, 3, dz)
    )  # fmt: skip
    t_dmu, t_dlogvar, t_deps = (
        operand(plan, 4, dmu), operand(plan, 5, dlogvar), operand(plan, 6, deps)
    )  # fmt: skip
    counters = shared.ctypes.data
    work = works[fetch_add(counters, WORKERS)]
    dtype, zero = works.dtype.type, works.dtype.type(0)
    lo, hi = dtype(numbers[0]), dtype(numbers[1])
    most = min(BLOCK, B * D)
    g, of_mu, of_logvar = (
        block(work, MORE, most), block(work, MORE + 1, most), block(work, MORE + 2, most)
    )  # fmt: skip
    of_mu[:], of_logvar[:] = zero, zero
    b_eps = block(work, 2, BLOCK)
    draws = has_dz and dlogvar != 0 and eps == 0
    key = (0, 0)
    if draws:
        key = read(state, 0, np.int64(0)), read(state, 1, np.int64(0))
    while True:
        first, end = next_pieces(plan, counters)
        if first == end:
            break
        for piece in range(first, end):
            col, cols, block_rows, first_row, end_row, _, _ = geometry(shape, piece)
            if dkl_of_mean != 0:
                n = block_rows * cols
                h = read(dkl_of_mean, 0, zero)
                of_mean_gradients(means, h, plan, col, cols, work, g, of_mu[:n], of_logvar[:n])
            if has_dkl and not per_row:
                g[: block_rows * cols] = read(dkl, 0, zero) / dtype(plan[DENOMINATOR])
            for row in range(first_row, end_row, block_rows):
                rows = min(block_rows, end_row - row)
                n = rows * cols
                place = (D, inner, row, rows, col, cols)
                if eps != 0:
                    b_eps = source(t_eps, place, block(work, 2, n))
                elif draws:
                    noise(work, key, D, place, b_eps)
                if has_dkl and per_row and D == 1:
                    read_run(dkl, row * plan[DKL_ROW], plan[DKL_ROW], g[:rows])
                elif has_dkl and per_row:
                    for r in range(rows):
                        g[r * cols : (r + 1) * cols] = read(dkl, (row + r) * plan[DKL_ROW], zero)
                b_mu = source(t_mu, place, block(work, 0, n)) if has_dkl else block(work, 0, n)
                b_dz = source(t_dz, place, block(work, 4, n)) if has_dz else block(work, 4, n)
                b_logvar = source(t_logvar, place, block(work, 1, n))
                held = b_logvar
                if plan[CLAMPED] != 0:
                    clamped(b_logvar, lo, hi, block(work, 3, n))
                    held = block(work, 3, n)
                b_dmu = target(t_dmu, place, block(work, 5, n))
                b_dlogvar = target(t_dlogvar, place, block(work, 6, n))
                b_deps = target(t_deps, place, block(work, 7, n))
                gradients(
                    b_mu, held, b_eps, b_dz, g, has_dz, has_dkl, of_mu, of_logvar,
                    b_dmu, b_dlogvar, b_deps,
                )  # fmt: skip
                if plan[CLAMPED] != 0:
                    zero_outside(b_logvar, lo, hi, b_dlogvar)
                deliver(t_dmu, place, b_dmu)
                deliver(t_dlogvar, place, b_dlogvar)
                deliver(t_deps, place, b_deps)


@njit(**KERNEL)
def backward(
    parallel, threads,  # of on_team
    works,  # each worker's own: BUFFERS blocks of the computation's dtype
    numbers,  # (lo, hi) of clamp, float64
    plan,  # int64: what is fixed about the call, see cpu_blocks
    shared,  # float64 zeros: counters (as int64) of all workers
    mu, logvar, eps,  # addresses of tensors; eps absent: drawn in forward, again here
    dz, dkl, dkl_of_mean, state, means, dmu, dlogvar, deps,  # addresses, as in ``backward_kernel``
):  # fmt: skip
    """The gradients. An address of 0: absent or not wanted."""
    arguments = (
        works, numbers, plan, shared, mu, logvar, eps, dz, dmu, dlogvar, deps, dkl, dkl_of_mean,
        means, state,
    )  # fmt: skip
    on_team(parallel, threads, walk, arguments)
