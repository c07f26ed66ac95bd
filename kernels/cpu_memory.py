"""CPU code: elements of tensors in memory, widened into blocks and rounded out of them.

A tensor is (address, kind, row, outer, inner): where it is (0: absent), how its elements are
stored, and its strides as in ``tile``. A block is a dense array of the computation's dtype.
"""

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic, overload

from .cpu_math import JIT, as_f32, as_i32, f32, i32

F32, F64, BF16, F16 = range(4)  # kinds of storage


@intrinsic
def _pointer(typingctx, address, like):
    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(like).as_pointer())

    return types.CPointer(like)(types.int64, like), generate


@njit(**JIT)
def array_at(address, like, n):
    """n elements of what `like` is an example of.

    numba counts references to arrays of its own, atomically, at each slice and call; not to these.
    """
    return carray(_pointer(address, like), n)


@intrinsic
def read(typingctx, address, index, like):
    """Element `index` of the array at `address` of what `like` is an example of."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], context.get_value_type(like).as_pointer())
        return builder.load(builder.gep(pointer, [args[1]]))

    return like(types.int64, types.int64, like), generate


@intrinsic
def write(typingctx, address, index, value):
    """Store value as element `index` of the array at `address`."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], context.get_value_type(value).as_pointer())
        builder.store(args[2], builder.gep(pointer, [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value), generate


@intrinsic
def fetch_add(typingctx, address, index):
    """Add 1 to an int64 that workers share; what it was before."""

    def generate(context, builder, signature, args):
        integer = context.get_value_type(types.int64)
        pointer = builder.gep(builder.inttoptr(args[0], integer.as_pointer()), [args[1]])
        return builder.atomic_rmw("add", pointer, integer(1), "acq_rel")

    return types.int64(types.int64, types.int64), generate


@njit(**JIT)
def bf16_to_f32(bits):
    return as_f32(i32(i32(bits) << 16))


@njit(**JIT)
def f32_to_bf16(value):
    bits = as_i32(value)
    rounded = i32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest even
    return np.int16(0x7FC0 if value != value else rounded)


@njit(**JIT)
def f16_to_f32(bits):
    size = i32(i32(bits) & 0x7FFF)
    # Subnormals as steps above 2^-14: as subnormals of float32 they take some machines long.
    normal = as_f32(i32((size << 13) + (112 << 23)))
    subnormal = as_f32(i32((size << 13) + (113 << 23))) - f32(2.0**-14)
    special = as_f32(i32((size << 13) | 0x7F800000))  # inf and NaN
    magnitude = subnormal if size < 0x400 else normal
    magnitude = special if size >= 0x7C00 else magnitude
    return as_f32(i32(as_i32(magnitude) | i32((i32(bits) & 0x8000) << 16)))


@njit(**JIT)
def f32_to_f16(value):
    bits = as_i32(value)
    size = i32(bits & 0x7FFFFFFF)
    # To nearest even: normal results by integers, subnormal ones by an addition that aligns them.
    normal = i32(size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13
    subnormal = i32(as_i32(as_f32(size) + f32(0.5)) - 0x3F000000)
    half = subnormal if size < 0x38800000 else normal
    half = 0x7C00 if size >= 0x477FF000 else half
    half = 0x7E00 if size > 0x7F800000 else half
    return np.uint16(half | ((bits >> 16) & 0x8000))


def widen(raw):
    """An element as it is stored (bfloat16: int16, float16: uint16) as a float."""
    raise NotImplementedError("compiled code only")


@overload(widen, jit_options=JIT)
def _widen(raw):
    if raw == types.int16:
        return lambda raw: bf16_to_f32(raw)
    if raw == types.uint16:
        return lambda raw: f16_to_f32(raw)
    return lambda raw: raw


def narrow(value, like):
    """A float rounded to what `like` is stored as."""
    raise NotImplementedError("compiled code only")


@overload(narrow, jit_options=JIT)
def _narrow(value, like):
    if like == types.int16:
        return lambda value, like: f32_to_bf16(f32(value))
    if like == types.uint16:
        return lambda value, like: f32_to_f16(f32(value))
    if like == types.float32:
        return lambda value, like: f32(value)
    return lambda value, like: float(value)


@njit(**JIT)
def _run_as(like, address, first, step, values, store):
    n = len(values)
    if store and step == 1:
        for i in range(n):
            write(address, first + i, narrow(values[i], like))
    elif store:
        for i in range(n):
            write(address, first + i * step, narrow(values[i], like))
    elif step == 1:
        for i in range(n):
            values[i] = widen(read(address, first + i, like))
    else:
        for i in range(n):
            values[i] = widen(read(address, first + i * step, like))


@njit(**JIT)
def read_run(address, first, step, values):
    """values[i] = element first + i step of an array of the same dtype."""
    _run_as(values.dtype.type(0), address, first, step, values, False)


@njit(**JIT)
def move_run(address, kind, first, step, values, store):
    """Element first + i step = values[i], rounded; or, not to be stored, the other way, widened."""
    if kind == F32:
        _run_as(f32(0), address, first, step, values, store)
    elif kind == F64:
        _run_as(0.0, address, first, step, values, store)
    elif kind == BF16:
        _run_as(np.int16(0), address, first, step, values, store)
    else:
        _run_as(np.uint16(0), address, first, step, values, store)


@njit(**JIT)
def _columns_as(like, address, first, s_row, s_col, cols, block, store):
    rows = len(block) // cols
    for j in range(cols):
        start = first + j * s_col
        if store:
            for r in range(rows):
                write(address, start + r * s_row, narrow(block[r * cols + j], like))
        else:
            for r in range(rows):
                block[r * cols + j] = widen(read(address, start + r * s_row, like))


@njit(**JIT)
def _move_columns(address, kind, first, s_row, s_col, cols, block, store):
    """As move_run for a whole block, down its columns."""
    if kind == F32:
        _columns_as(f32(0), address, first, s_row, s_col, cols, block, store)
    elif kind == F64:
        _columns_as(0.0, address, first, s_row, s_col, cols, block, store)
    elif kind == BF16:
        _columns_as(np.int16(0), address, first, s_row, s_col, cols, block, store)
    else:
        _columns_as(np.uint16(0), address, first, s_row, s_col, cols, block, store)


# Where a block lies: (D, inner, first row, rows, first column, columns).


@njit(**JIT)
def _is_block(tensor, place, like):
    """Do the elements lie in memory as in a block?"""
    _, kind, s_row, _, s_inner = tensor
    event, inner, _, rows, _, cols = place
    whole = s_inner == 1 and event == inner and (rows == 1 or s_row == cols)
    return whole and kind == (F32 if like.itemsize == 4 else F64)


@njit(**JIT)
def _move(tensor, place, block, store):
    address, kind, s_row, s_outer, s_inner = tensor
    event, inner, row, rows, col, cols = place
    if s_inner == 1 and event == inner and s_row == cols:
        rows, cols = 1, rows * cols  # rows end to end
    if event == inner and s_inner != 1 and s_row < s_inner and rows > 1:  # as of x.t()
        first = row * s_row + col * s_inner
        _move_columns(address, kind, first, s_row, s_inner, cols, block[: rows * cols], store)
        return
    for r in range(rows):
        j = 0
        while j < cols:
            i_outer, i_inner, n = 0, col, cols
            if event != inner:
                i_outer, i_inner = divmod(col + j, inner)
                n = min(inner - i_inner, cols - j)
            first = (row + r) * s_row + i_outer * s_outer + i_inner * s_inner
            run = block[r * cols + j : r * cols + j + n]
            move_run(address, kind, first, s_inner, run, store)
            j += n


@njit(**JIT)
def _in_memory(tensor, place, like):
    address, _, s_row, _, _ = tensor
    _, _, row, rows, col, cols = place
    start = address + (row * s_row + col) * like.itemsize
    return array_at(start, like.dtype.type(0), rows * cols)


@njit(**JIT)
def source(tensor, place, block):
    """The values of a tensor at a place: its own memory if it serves, or else the block, filled."""
    if _is_block(tensor, place, block):
        return _in_memory(tensor, place, block)
    _move(tensor, place, block, False)
    return block


@njit(**JIT)
def target(tensor, place, block):
    """Where to put results: the tensor's own memory if it serves, or else the block."""
    if tensor[0] != 0 and _is_block(tensor, place, block):
        return _in_memory(tensor, place, block)
    return block


@njit(**JIT)
def deliver(tensor, place, values):
    """Results that `target` has not put into their tensor yet."""
    if tensor[0] != 0 and not _is_block(tensor, place, values):
        _move(tensor, place, values, True)
