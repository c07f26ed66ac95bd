"""CPU code: column sums over the samples in one pass; the twin of ``statistics`` (see there)."""

from typing import NamedTuple

import numpy as np
from numba import njit

from .gaussian import exp_terms
from .memory import BLOCK, block, write
from .numeric import JIT, KERNEL
from .plan import Operand, operands_at, plan_at
from .reduction import accumulate, add_rows, copy, fold, side_by_side
from .team import on_team
from .tile import Place, source
from .walk import TILES, is_last_range, join, pieces, places, workspace

COLUMN_SUMS = 8  # of each column
# Blocks of a worker's memory: parameters, the other terms that are summed, the sums, the shifts.
MU, LOGVAR, DISTANCE, SQUARE, EXP, PHI, BAD_MU, BAD_LOGVAR, OUTSIDE, SUMS = range(10)
SHIFT = SUMS + COLUMN_SUMS
BUFFERS = SHIFT + 1


class Tensors(NamedTuple):
    """What workers read and write."""

    mu: Operand
    logvar: Operand
    out: int  # address


def scratch_size(plan):
    """Length of scratch: counters, then [ranges, COLUMN_SUMS, D]."""
    return TILES + plan.tiles + plan.ranges * COLUMN_SUMS * plan.event


# Three loops, since in one LLVM could not prove that the arrays do not overlap, and would not
# vectorise.


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
def add_block(plan, own, b_mu, b_logvar, shift, sums):
    """The terms of a block to the sums of their columns."""
    n = len(b_mu)
    distance, square, bad_mu = block(own, DISTANCE, n), block(own, SQUARE, n), block(own, BAD_MU, n)
    exp, phi = block(own, EXP, n), block(own, PHI, n)
    bad_logvar, outside = block(own, BAD_LOGVAR, n), block(own, OUTSIDE, n)
    mu_terms(b_mu, shift, distance, square, bad_mu)
    exp_phi(b_logvar, exp, phi)
    logvar_flags(b_logvar, plan.low, plan.high, bad_logvar, outside)
    add_rows(sums[0], distance)
    add_rows(sums[1], square)
    add_rows(sums[2], b_logvar)
    add_rows(sums[3], exp)
    add_rows(sums[4], phi)
    add_rows(sums[5], bad_mu)
    add_rows(sums[6], bad_logvar)
    add_rows(sums[7], outside)


@njit(**JIT)
def finish_tile(plan, piece, sums, shift, scratch, out):
    """After a piece: its column sums, and if it is the last range of its tile those of the tile."""
    D, col, cols = plan.event, piece.col, piece.cols
    columns = scratch[TILES + plan.tiles :].reshape(plan.ranges, COLUMN_SUMS, D)
    for i in range(COLUMN_SUMS):
        fold(sums[i], cols)
        copy(sums[i, :cols], columns[piece.i_range, i, col : col + cols])
    if not is_last_range(plan, piece, scratch):
        return
    for i in range(COLUMN_SUMS):
        total = sums[i, :cols]
        total[:] = 0.0
        for r in range(plan.ranges):
            accumulate(total, columns[r, i, col : col + cols])
        for j in range(cols):
            write(out, i * D + col + j, total[j])
    for j in range(cols):
        write(out, COLUMN_SUMS * D + col + j, shift[j])


@njit(**JIT)
def work(plan, space, tensors):
    """A worker's part: pieces until none is left."""
    mu, logvar, out = tensors
    own, scratch = join(space), space.scratch
    shift = block(own, SHIFT, BLOCK)
    for piece in pieces(plan, scratch):
        col, cols = piece.col, piece.cols
        anchor = source(mu, Place(0, 1, col, cols, plan.event, plan.inner), block(own, MU, cols))
        for start in range(0, piece.block_rows * cols, cols):
            copy(anchor, shift[start : start + cols])
        sums = block(own, SUMS, COLUMN_SUMS * BLOCK).reshape(COLUMN_SUMS, BLOCK)
        sums = sums[:, : side_by_side(piece)]
        sums[:] = 0.0
        for place in places(plan, piece):
            n = place.rows * cols
            b_mu = source(mu, place, block(own, MU, n))
            b_logvar = source(logvar, place, block(own, LOGVAR, n))
            add_block(plan, own, b_mu, b_logvar, shift, sums)
        finish_tile(plan, piece, sums, shift, scratch, out)


@njit(**KERNEL)
def statistics_kernel(
    parallel, threads,  # of on_team
    memories,  # float64[threads, BUFFERS * BLOCK]: each worker's own
    plan,  # address of a packed plan: of mu, logvar
    scratch,  # float64[scratch_size], zeros
    mu, logvar,  # addresses, [B, D]
    out,  # address, float64[COLUMN_SUMS + 1, D]
):  # fmt: skip
    """Column sums."""
    mu, logvar = operands_at(plan, (mu, logvar))
    plan, space = plan_at(plan), workspace(memories, scratch)
    on_team(parallel, threads, work, (plan, space, Tensors(mu, logvar, out)))
