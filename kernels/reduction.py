"""Device code: sums over programs, finished inside the launch that makes them.

Each program writes its partial sums to scratch and then arrives at a counter; the last to arrive
adds all partials in a fixed order, so the result does not depend on which one it is. No program
waits for another, so none need be resident together, and the counter is back at 0 at the end.

Partial sums of many row ranges are added in rounds: by the last program of each group of ranges,
then by the last of each group of groups, until there is one. So no program reads many blocks one
after the other.
"""

import triton
import triton.language as tl
from triton.language.target_info import current_target

GROUP = tl.constexpr(16)  # partial sums that one program adds up, at most
SCALARS_AT_ONCE = tl.constexpr(512)


@triton.constexpr_function
def is_gfx9():
    """Is it compiled for one of AMD's data-centre GPUs?"""
    target = None if triton.knobs.runtime.interpret else current_target()
    return target is not None and target.backend == "hip" and target.arch.startswith("gfx9")


@triton.constexpr_function
def is_interpreted():
    """Does it run in Triton's interpreter?"""
    return triton.knobs.runtime.interpret


def partial_sums(ranges):
    """How many are left in all rounds: [ranges], [groups], ...; and that many counters do."""
    count = 0
    while ranges > 1:
        count += ranges
        ranges = -(-ranges // GROUP.value)
    return count


@triton.jit
def arrive(p_counter, count):
    """True in the last of `count` programs to arrive; it resets the counter for the next launch."""
    # Triton puts no barrier between stores of a tile and the one thread that does the atomic:
    # without this one, another program could read partials that are not yet written. The release
    # covers what the barrier has ordered before it; but on gfx9 it waits for the stores of its own
    # wave alone, and at a barrier LLVM lets no wave wait for its stores, as it does elsewhere.
    if is_gfx9():
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)", "=v", [], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()
    is_last = tl.atomic_add(p_counter, 1, sem="acq_rel") == count.to(tl.int32) - 1
    if is_last:
        tl.store(p_counter, 0)
    return is_last


@triton.jit
def group_of(i, n):
    """The first of n partial sums in the group of the i-th, and how many are in it."""
    first = i // GROUP * GROUP
    return first, tl.minimum(n - first, GROUP)


@triton.jit
def column_sums(b_values):
    """Sums down the columns of a block."""
    # The interpreter adds row to row, with an error that grows with their number; a device adds in
    # a tree, as this does.
    if is_interpreted():
        while b_values.shape[0] > 1:
            halves = (2, b_values.shape[0] // 2, b_values.shape[1])
            b_first, b_second = tl.split(tl.permute(tl.reshape(b_values, halves), (1, 2, 0)))
            b_values = b_first + b_second
    return tl.sum(b_values, axis=0)


# What other programs wrote is read past L1 (.cg).


@triton.jit
def sum_scalars(p_first, count, DTYPE: tl.constexpr):
    """Sum of `count` scalars."""
    b_sum = tl.zeros([SCALARS_AT_ONCE], DTYPE)
    for start in range(0, count, SCALARS_AT_ONCE):
        o_index = start + tl.arange(0, SCALARS_AT_ONCE)
        b_sum += tl.load(p_first + o_index, o_index < count, 0.0, cache_modifier=".cg")
    return tl.sum(b_sum)


@triton.jit
def sum_of_group(p_first, count):
    """Sum of `count` scalars, GROUP at most."""
    o_index = tl.arange(0, GROUP)
    return tl.sum(tl.load(p_first + o_index, o_index < count, 0.0, cache_modifier=".cg"))


@triton.jit
def load_group(p_first, stride, count, m_col, COLS: tl.constexpr):
    """A block [count, COLS] of partial sums, of rows `stride` apart."""
    o_row = tl.arange(0, GROUP)
    m_tile = (o_row < count)[:, None] & m_col[None, :]
    p_tile = p_first + o_row.to(tl.int64)[:, None] * stride + tl.arange(0, COLS)[None, :]
    return tl.load(p_tile, m_tile, 0.0, cache_modifier=".cg")


@triton.jit
def row_sums(
    p_first, stride, o_row, m_row, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Sums of rows of `stride` elements each."""
    b_sum = tl.zeros([ROWS, COLS], DTYPE)
    p_row = p_first + o_row.to(tl.int64)[:, None] * stride
    for start in range(0, stride, COLS):
        o_col = start + tl.arange(0, COLS)
        m_tile = m_row[:, None] & (o_col < stride)[None, :]
        b_sum += tl.load(p_row + o_col[None, :], m_tile, 0.0, cache_modifier=".cg")
    return tl.sum(b_sum, axis=1)
