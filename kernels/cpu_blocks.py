"""CPU code: how the batch is cut into pieces and blocks, and the passes that both ways share."""

from numba import njit

from .cpu_math import JIT, i32
from .cpu_memory import array_at, fetch_add
from .cpu_noise import normals

BLOCK = 2048  # elements of a block, each row of it rounded up to whole groups of noise
#: A worker's memory, in blocks: 8 for values, 1 for the noise in the making and 1 for its words,
#: then column sums (2 of float64, that is 4) in forward, 3 upstream gradients in backward.
BUFFERS = 14
NOISE, WORDS, MORE = 8, 9, 10
NONE, BATCH, ALL = range(3)  # what kl_of_mean averages over

# What is fixed about a call is one int64 vector, `plan`: these entries, then (kind, row, outer,
# inner) of each tensor. The first five are `shape_of`.
CHUNK, PER_ROW, MEAN_OVER, CLAMPED, DENOMINATOR, DKL_ROW, TENSORS = range(5, 12)
# What workers count together, int64: chunks taken, workers, then ranges done of each tile.
TAKEN, WORKERS, TILES = range(3)


@njit(**JIT)
def operand(plan, i, address):
    """The i-th tensor of a plan."""
    at = TENSORS + 4 * i
    return address, plan[at], plan[at + 1], plan[at + 2], plan[at + 3]


@njit(**JIT)
def shape_of(plan):
    """(B, D, inner, columns of a tile, rows of a range)."""
    return plan[0], plan[1], plan[2], plan[3], plan[4]


@njit(**JIT)
def counts(shape):
    """(column tiles, row ranges); there is a piece for each pair."""
    B, D, _, tile_cols, range_rows = shape
    return (D + tile_cols - 1) // tile_cols, (B + range_rows - 1) // range_rows


@njit(**JIT)
def next_pieces(plan, counters):
    """Pieces for a worker to do: (first, end), equal when none is left."""
    n_tiles, n_ranges = counts(shape_of(plan))
    pieces = n_tiles * n_ranges
    first = min(fetch_add(counters, TAKEN) * plan[CHUNK], pieces)
    return first, min(first + plan[CHUNK], pieces)


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
def block(work, i, n):
    """The first n elements of the i-th block of a worker's memory."""
    return array_at(work.ctypes.data + i * BLOCK * work.itemsize, work.dtype.type(0), n)


@njit(**JIT)
def noise(work, key, D, place, eps):
    """eps of a place; it has room for a block."""
    _, _, row, rows, col, cols = place
    first = row * ((D + 3) // 4) + col // 4
    words = array_at(block(work, WORDS, 0).ctypes.data, i32(0), BLOCK)
    normals(key, first, rows, cols, words, block(work, NOISE, BLOCK), eps)


@njit(**JIT)
def clamped(values, lo, hi, out):
    """torch.clamp: NaN passes."""
    for i in range(len(values)):
        value = values[i]
        value = lo if value < lo else value
        out[i] = hi if value > hi else value


@njit(**JIT)
def copy(values, out):
    """As out[:] = values, which takes ten times as long to compile."""
    for i in range(len(values)):
        out[i] = values[i]


@njit(**JIT)
def accumulate(sums, values):
    for i in range(len(values)):
        sums[i] += values[i]


@njit(**{**JIT, "fastmath": {"contract", "reassoc"}})
def total(values):
    """Sum in float64, in an order that depends on the length alone."""
    result = 0.0
    for i in range(len(values)):
        result += values[i]
    return result
