"""Device code: where the elements of a tile lie.

Every tensor is seen as [row, outer, inner]: row is the flat sample index b, and column j of an
event lies at (j // inner) stride_outer + (j % inner) stride_inner. SPLIT is False where one
stride (stride_inner) describes the whole event. Samples that follow each other may be handed over
as one row, where nothing is asked of rows or columns.

D, inner, and row and outer strides come divided by UNIT, the largest power of 2 that divides all of
them, up to 16 bytes: so it is known when the kernel compiles that rows begin and end there, and a
thread reads and writes so many columns at a time. Where noise is drawn, up to a group of it: eight
elements of half precision would have to change threads for their noise.

Short events may lie beside each other in a row of a tile, each in `inner` columns, of which it may
leave the last ones idle: then o_row counts rows of `beside` samples, and strides are as if these
were one event.

Where channels come last in memory, so do they in the order of columns: column k is channel
k % CHANNELS, of which there are a power of 2, at position k // CHANNELS. CHANNELS is 1 elsewhere.
"""

import triton
import triton.language as tl

from .reduction import column_sums


def strides(*tensors):
    """The names of all strides of these, as arguments of a kernel."""
    return [f"{name}_{axis}" for name in tensors for axis in ("row", "outer", "inner")]


@triton.jit
def offsets(
    o_row, o_col, inner, stride_row, stride_outer, stride_inner,
    SPLIT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Element offsets of rows x columns; as wide as the row and column indices."""
    o_event = event_offsets(o_col, inner, stride_outer, stride_inner, SPLIT, UNIT)
    return (o_row * UNIT)[:, None] * stride_row + o_event[None, :]


@triton.jit
def event_offsets(
    o_col, inner, stride_outer, stride_inner, SPLIT: tl.constexpr, UNIT: tl.constexpr
):
    """Of columns, from where their row begins."""
    if SPLIT:
        o_event = (o_col // inner) * UNIT * stride_outer + (o_col % inner) * stride_inner
    else:
        o_event = o_col * stride_inner
    return o_event


@triton.jit
def load(p_x, o_x, m_tile, other, DTYPE: tl.constexpr):
    """Of a tile, in the dtype of the computation."""
    return tl.load(p_x + o_x, m_tile, other).to(DTYPE)


@triton.jit
def fit(values, pointer):
    """Values as they can be stored there: Triton's interpreter makes nonsense of float64 on its way
    to bfloat16.
    """
    if values.dtype == tl.float64:
        if pointer.dtype.element_ty == tl.bfloat16:
            values = values.to(tl.float32)
    return values


@triton.jit
def columns(units, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """A number of columns, of one of units."""
    if WIDE:
        units = units.to(tl.int64)
    return units * UNIT


@triton.jit
def places(o_col, D, CHANNELS: tl.constexpr):
    """Where in an event columns are."""
    if CHANNELS == 1:
        o_place = o_col
    else:
        o_place = (o_col % CHANNELS) * (D // CHANNELS) + o_col // CHANNELS
    return o_place


@triton.jit
def rows_of_columns(o_col, inner, beside, B, D):
    """How many rows a column has, where there are samples beside each other."""
    o_sample = o_col // inner
    m_col = (o_sample < beside) & (o_col % inner < D)
    return tl.where(m_col, (B - o_sample + beside - 1) // beside, 0)


@triton.jit
def of_one_event(b_sums, inner, COLS: tl.constexpr, EVENT_COLS: tl.constexpr):
    """Sums of columns, of samples beside each other, added up for each element of the event."""
    o_place = tl.arange(0, COLS) % inner
    m_tile = o_place[:, None] == tl.arange(0, EVENT_COLS)[None, :]
    return column_sums(tl.where(m_tile, b_sums[:, None], 0.0))


@triton.jit
def event_columns(o_col, m_col, D, EVENT_COLS: tl.constexpr):
    """Columns of one event, and which of them there are; o_col and m_col are a tile's."""
    if EVENT_COLS > 0:
        o_col = tl.arange(0, EVENT_COLS)
        m_col = o_col < D
    return o_col, m_col


@triton.jit
def event_tile(col, D, CHANNELS: tl.constexpr, COLS: tl.constexpr):
    """Places of the columns col .. col + COLS in the order of the event, which is that of memory
    for what has the event's size; and which of them there are.
    """
    o_col = tl.arange(0, COLS)
    if CHANNELS == 1:
        o_place = col + o_col
        m_place = o_place < D
    else:
        positions = tl.multiple_of(D // CHANNELS, 4)
        o_position = col // CHANNELS + o_col % (COLS // CHANNELS)
        o_place = o_col // (COLS // CHANNELS) * positions + o_position
        m_place = o_position < positions
    return o_place, m_place


@triton.jit
def places_of_tile(
    o_col, m_col, col, D, inner,
    EVENT_COLS: tl.constexpr, CHANNELS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``event_tile``, of samples beside each other, too."""
    if EVENT_COLS > 0:
        o_place, m_place = o_col % inner, m_col
    else:
        o_place, m_place = event_tile(col, D, CHANNELS, COLS)
    return o_place, m_place


@triton.jit
def in_event(b_columns, CHANNELS: tl.constexpr, COLS: tl.constexpr):
    """Columns in the order of ``event_tile``."""
    if CHANNELS > 1:
        b_columns = tl.trans(tl.reshape(b_columns, (COLS // CHANNELS, CHANNELS)))
    return tl.reshape(b_columns, (COLS,))


@triton.jit
def in_columns(b_event, CHANNELS: tl.constexpr, COLS: tl.constexpr):
    """And back."""
    if CHANNELS > 1:
        b_event = tl.trans(tl.reshape(b_event, (CHANNELS, COLS // CHANNELS)))
    return tl.reshape(b_event, (COLS,))


@triton.jit
def program(AXIS: tl.constexpr, WIDE: tl.constexpr):
    """The program's index, as int64 where what is counted from it may pass 2^31."""
    i_program = tl.program_id(AXIS)
    if WIDE:
        i_program = i_program.to(tl.int64)
    return i_program
