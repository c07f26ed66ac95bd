"""CPU code: the walk over a batch that all kernels take.

The batch is cut into pieces: column tiles (at most BLOCK wide) x row ranges. Workers (the threads
of a team) take the next chunk of pieces until none is left, and walk down the rows of each a block
at a time. A block is some rows, so that it is as full for 2 columns as for 500.

What workers share is ``scratch``, float64 zeros to begin with: counters (read as int64), then the
sums that each piece writes. Who finishes the last range of a tile adds up its columns; once all is
done the calling thread adds up the rest. The order is fixed: results do not depend on how many
workers there are or which did what.
"""

from typing import NamedTuple

from numba import njit, types

from .memory import BLOCK, array_at, fetch_add
from .numeric import JIT
from .reduction import accumulate, copy, fold
from .tile import Place

# Counters: chunks taken, workers, then ranges done of each tile.
TAKEN, WORKERS, TILES = range(3)


class Workspace(NamedTuple):
    """What workers work in."""

    memories: types.Array  # of the computation's dtype: each worker's own, one after the other
    each: int  # elements of one
    scratch: types.Array  # float64


class Piece(NamedTuple):
    """A row range of a column tile."""

    index: int
    i_tile: int
    i_range: int
    col: int  # the first
    cols: int
    first_row: int
    end_row: int
    block_rows: int  # rows of a block, at most


@njit(**JIT)
def workspace(memories, scratch):
    """What workers work in, of the arrays of the host.

    numba counts references to those, atomically, at each slice and call; not to these.
    """
    like, (_, each) = memories.dtype.type(0), memories.shape
    memories = array_at(memories.ctypes.data, like, memories.size)
    return Workspace(memories, each, array_at(scratch.ctypes.data, 0.0, len(scratch)))


@njit(**JIT)
def join(space):
    """A worker's own memory, which no other has."""
    start = fetch_add(space.scratch.ctypes.data, WORKERS) * space.each
    return space.memories[start : start + space.each]


@njit(**JIT)
def is_last_range(plan, piece, scratch):
    """Are all ranges of the piece's tile done, with this one?"""
    return fetch_add(scratch.ctypes.data, TILES + piece.i_tile) == plan.ranges - 1


@njit(**JIT)
def tile_sums(plan, piece, sums, columns, scratch):
    """Two sums of each column, of a piece, into those of its tile: are all ranges in them?

    What `sums` are of is left in `columns`, float64[ranges, 2, D], where there are several ranges.
    """
    cols, D = piece.cols, plan.event
    fold(sums[0], cols)
    fold(sums[1], cols)
    if plan.ranges == 1:
        return True
    a, b = sums[0][:cols], sums[1][:cols]
    here = 2 * piece.i_range * D + piece.col
    copy(a, columns[here : here + cols])
    copy(b, columns[here + D : here + D + cols])
    if not is_last_range(plan, piece, scratch):
        return False
    a[:], b[:] = 0.0, 0.0
    for here in range(piece.col, 2 * plan.ranges * D, 2 * D):
        accumulate(a, columns[here : here + cols])
        accumulate(b, columns[here + D : here + D + cols])
    return True


@njit(**JIT)
def _piece(plan, index):
    i_range, i_tile = divmod(index, plan.tiles)
    col = i_tile * plan.tile_cols
    cols = min(plan.tile_cols, plan.event - col)
    first_row = i_range * plan.range_rows
    end_row = min(first_row + plan.range_rows, plan.batch)
    # Several rows only if they are whole: their groups of noise follow each other.
    block_rows = min(BLOCK // ((cols + 3) // 4 * 4), end_row - first_row) if plan.tiles == 1 else 1
    return Piece(index, i_tile, i_range, col, cols, first_row, end_row, block_rows)


@njit(**JIT)
def pieces(plan, scratch):
    """Pieces for a worker to do, until none is left."""
    count, chunk = plan.tiles * plan.ranges, plan.chunk
    first = fetch_add(scratch.ctypes.data, TAKEN) * chunk
    while first < count:
        for index in range(first, min(first + chunk, count)):
            yield _piece(plan, index)
        first = fetch_add(scratch.ctypes.data, TAKEN) * chunk


@njit(**JIT)
def places(plan, piece):
    """The blocks of a piece, from its first row down; of several draws, none beyond its own."""
    row = piece.first_row
    while row < piece.end_row:
        rows = min(piece.block_rows, piece.end_row - row)
        if plan.period != 0:
            rows = min(rows, plan.period - row % plan.period)
        yield Place(row, rows, piece.col, piece.cols, plan.event, plan.inner)
        row += rows


@njit(**JIT)
def of_one_draw(plan, place):
    """Where a block's parameters are, which all draws share if there are several."""
    row = place.row if plan.period == 0 else place.row % plan.period
    return Place(row, place.rows, place.col, place.cols, place.event, place.inner)
