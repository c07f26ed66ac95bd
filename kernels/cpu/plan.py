"""CPU code: what is fixed about a call. The host writes it once, kernels read it by name.

A packed plan is the fields of ``Plan``, then (kind, row, outer, inner) of each operand, in words of
eight bytes. Kernels get its address: a number costs less at each call than any other argument. In
compiled code named tuples cost nothing.
"""

from array import array
from functools import cache
from itertools import chain
from struct import Struct
from typing import NamedTuple

from numba import types
from numba.extending import intrinsic

NONE, BATCH, ALL = range(3)  # what kl_of_mean averages over


class Plan(NamedTuple):
    """Sizes and options of a call."""

    batch: int  # B: rows
    event: int  # D: columns
    inner: int  # columns that one stride serves, as in ``tile``
    tile_cols: int  # columns of a tile
    range_rows: int  # rows of a range
    tiles: int  # column tiles
    ranges: int  # row ranges
    chunk: int  # pieces that a worker takes at a time
    per_row: int  # 1: kl is wanted for each sample
    per_col: int  # 1: for each element of an event
    mean_over: int  # NONE, BATCH, ALL
    denominator: int  # of kl
    dkl_row: int  # stride of the upstream gradient of kl, where it is no number, or of log_q
    dsecond_row: int  # of that of log_p
    by_path: int  # 1: log_q holds its parameters
    period: int  # rows of one draw, whose parameters all draws have; 0: each row has its own
    form: int  # of the scale: a number of ``forms``
    keyed: int  # 1: each row has a noise key of its own
    prior_sums: int  # 1: gradients of the prior are wanted, and are sums over the samples
    low: float  # bounds on logvar, or infinite; statistics count what is outside of [low, high]
    high: float


class Operand(NamedTuple):
    """A tensor in memory."""

    address: int  # of its first element; 0: absent, or not wanted
    kind: int  # how its elements are stored
    row: int  # strides, as in ``tile``
    outer: int
    inner: int


_FIELDS = tuple(Plan.__annotations__.values())
_DENOMINATOR = Plan._fields.index("denominator")
_LAYOUT = len(Operand._fields) - 1  # words of an operand: all but its address


@cache
def _words(operands):
    """The words of a plan and so many operands."""
    return Struct(
        "".join({int: "q", float: "d"}[kind] for kind in _FIELDS) + operands * _LAYOUT * "q"
    )


def pack(plan, layouts):
    """A plan, and (kind, row, outer, inner) of each operand, to be kept for who has its address."""
    return array("q", _words(len(layouts)).pack(*plan, *chain.from_iterable(layouts)))


def resized(packed, batch, event, denominator):
    """Another packed plan, without a prior: that of rows, one piece and its operands contiguous, of
    another size.
    """
    words = packed[:]
    # batch, event, inner, tile_cols, range_rows: the first of a Plan.
    words[:5] = array("q", (batch, event, event, event, batch))
    words[_DENOMINATOR] = denominator
    for row in range(len(_FIELDS) + 1, len(words), _LAYOUT):
        if words[row] != 0:
            words[row] = event
    return words


def _load(context, builder, address, first, kinds):
    """The words from `first` on of the memory at an address, of these types."""
    word = context.get_value_type(types.int64)
    start = builder.inttoptr(address, word.as_pointer())
    for i, kind in enumerate(kinds, first):
        pointer = context.get_value_type(kind).as_pointer()
        yield builder.load(builder.bitcast(builder.gep(start, [word(i)]), pointer))


@intrinsic
def plan_at(typingctx, address):
    """The plan that is packed at an address."""
    fields = [{int: types.int64, float: types.float64}[kind] for kind in _FIELDS]
    plan = types.BaseTuple.from_types(fields, Plan)

    def generate(context, builder, signature, args):
        values = list(_load(context, builder, args[0], 0, fields))
        return context.make_tuple(builder, plan, values)

    return plan(types.int64), generate


@intrinsic
def operands_at(typingctx, address, addresses):
    """The operands of these addresses, in the order in which the plan at `address` has them."""
    fields = [types.int64] * _LAYOUT
    operand = types.BaseTuple.from_types([types.int64, *fields], Operand)
    result = types.UniTuple(operand, len(addresses))

    def generate(context, builder, signature, args):
        operands = []
        for i in range(len(addresses)):
            layout = _load(context, builder, args[0], len(_FIELDS) + _LAYOUT * i, fields)
            values = [builder.extract_value(args[1], i), *layout]
            operands.append(context.make_tuple(builder, operand, values))
        return context.make_tuple(builder, result, operands)

    return result(types.int64, addresses), generate
