"""CPU code: how the batch is cut into pieces and blocks, and the passes that both ways share."""

import numpy as np
from numba import njit

from .cpu_math import JIT, exp_terms

BLOCK = 1024  # elements of a block, each row of it rounded up to whole groups of noise
BUFFERS = 10  # rows of `work`: 6 for values, 4 for the lanes of the noise
NONE, BATCH, ALL = range(3)  # what kl_of_mean averages over

# What is fixed about a call is one int64 vector, `plan`: these entries, then (kind, row, outer,
# inner) of each tensor.
SHAPE = slice(0, 5)  # B, D, inner, columns of a tile, rows of a range
CHUNK, PER_ROW, MEAN_OVER, CLAMPED, DENOMINATOR, DKL_ROW, TENSORS = range(5, 12)


@njit(**JIT)
def operand(plan, i, address):
    """The i-th tensor of a plan."""
    at = TENSORS + 4 * i
    return address, plan[at], plan[at + 1], plan[at + 2], plan[at + 3]


@njit(**JIT)
def shape_of(plan):
    """(B, D, inner, tile_cols, range_rows)."""
    return plan[0], plan[1], plan[2], plan[3], plan[4]


@njit(**JIT)
def counts(shape):
    """(column tiles, row ranges); there is a piece for each pair."""
    B, D, _, tile_cols, range_rows = shape
    return (D + tile_cols - 1) // tile_cols, (B + range_rows - 1) // range_rows


@njit(**JIT)
def geometry(shape, piece):
    """(col, cols, block_rows, first_row, end_row, i_tile, i_range) of a piece."""
    B, D, _, tile_cols, range_rows = shape
    n_tiles = counts(shape)[0]
    i_range, i_tile = divmod(piece, n_tiles)
    col = i_tile * tile_cols
    cols = min(tile_cols, D - col)
    first_row = i_range * range_rows
    end_row = min(first_row + range_rows, B)
    # Several rows only if they are whole: their groups of noise follow each other.
    block_rows = min(BLOCK // ((cols + 3) // 4 * 4), end_row - first_row) if n_tiles == 1 else 1
    return col, cols, block_rows, first_row, end_row, i_tile, i_range


@njit(**JIT)
def workspace(numbers):
    """(work, words, lanes) of one worker, for values of the dtype of `numbers`."""
    work = np.empty((BUFFERS, BLOCK), numbers.dtype)
    lanes = work[BUFFERS - 4 :].reshape(-1)[:BLOCK].reshape(4, BLOCK // 4)
    return work, np.empty((4, BLOCK // 4), np.int32), lanes


@njit(**JIT)
def clamp(values, lo, hi):
    """torch.clamp: NaN passes."""
    for i in range(len(values)):
        value = values[i]
        value = lo if value < lo else value
        values[i] = hi if value > hi else value


@njit(**JIT)
def square_plus(mu, phi):
    """phi becomes twice the KL of each element."""
    for i in range(len(mu)):
        phi[i] += mu[i] * mu[i]


@njit(**JIT)
def std_and_phi(logvar, std, phi):
    """What forward needs of each logvar."""
    for i in range(len(logvar)):
        std[i], _, phi[i] = exp_terms(logvar[i])


@njit(**JIT)
def std_and_expm1(logvar, std, expm1):
    """What backward needs of each logvar."""
    for i in range(len(logvar)):
        std[i], expm1[i], _ = exp_terms(logvar[i])


@njit(**JIT)
def accumulate(sums, values):
    for i in range(len(values)):
        sums[i] += values[i]


@njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})
def total(values):
    """Sum in float64, in an order that depends on the length alone."""
    result = 0.0
    for i in range(len(values)):
        result += values[i]
    return result
