"""Device code: where the elements of a tile lie.

Every tensor is seen as [row, outer, inner]: row is the flat sample index b, and column j of an
event lies at (j // inner) stride_outer + (j % inner) stride_inner. SPLIT is False where one
stride (stride_inner) describes the whole event.
"""

import triton
import triton.language as tl


@triton.jit
def offsets(o_row, o_col, inner, stride_row, stride_outer, stride_inner, SPLIT: tl.constexpr):
    """Element offsets of rows x columns; as wide as the row and column indices."""
    if SPLIT:
        o_event = (o_col // inner) * stride_outer + (o_col % inner) * stride_inner
    else:
        o_event = o_col * stride_inner
    return o_row[:, None] * stride_row + o_event[None, :]


@triton.jit
def program(AXIS: tl.constexpr, WIDE: tl.constexpr):
    """The program's index, as int64 where what is counted from it may pass 2^31."""
    i_program = tl.program_id(AXIS)
    if WIDE:
        i_program = i_program.to(tl.int64)
    return i_program
