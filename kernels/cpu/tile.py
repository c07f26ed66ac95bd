"""CPU code: operands read into blocks and written from them; the twin of ``tile``.

A block is a dense array of the computation's dtype, a row of the tile after the other.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from .memory import array_at, read, write
from .numeric import JIT, f32
from .storage import BF16, F32, F64, narrow, widen


class Place(NamedTuple):
    """Where a block lies in every operand."""

    row: int  # the first
    rows: int
    col: int  # the first
    cols: int
    event: int  # columns of the operands
    inner: int  # of which one stride serves so many


class Lines(NamedTuple):
    """Elements of a tensor, as lines of them."""

    address: int  # of the tensor
    first: int  # element of it
    line: int  # stride from a line to the next
    step: int  # stride along a line


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
def read_rows(place, address, step, values):
    """One element of an array of the same dtype for each row of a block, in all of the row."""
    rows, cols, zero = place.rows, place.cols, values.dtype.type(0)
    if place.event == 1:
        read_run(address, place.row * step, step, values[:rows])
        return
    for r in range(rows):
        values[r * cols : (r + 1) * cols] = read(address, (place.row + r) * step, zero)


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
def _columns_as(like, columns, rows, block, store):
    cols = len(block) // rows
    for j in range(cols):
        start = columns.first + j * columns.line
        if store:
            for r in range(rows):
                value = narrow(block[r * cols + j], like)
                write(columns.address, start + r * columns.step, value)
        else:
            for r in range(rows):
                value = read(columns.address, start + r * columns.step, like)
                block[r * cols + j] = widen(value)


@njit(**JIT)
def _move_columns(columns, kind, rows, block, store):
    """As move_run for a whole block, down its columns."""
    if kind == F32:
        _columns_as(f32(0), columns, rows, block, store)
    elif kind == F64:
        _columns_as(0.0, columns, rows, block, store)
    elif kind == BF16:
        _columns_as(np.int16(0), columns, rows, block, store)
    else:
        _columns_as(np.uint16(0), columns, rows, block, store)


@njit(**JIT)
def _is_block(tensor, place, like):
    """Do the elements lie in memory as in a block?"""
    in_rows = tensor.inner == 1 and place.event == place.inner
    whole = in_rows and (place.rows == 1 or tensor.row == place.cols)
    return whole and tensor.kind == (F32 if like.itemsize == 4 else F64)


@njit(**JIT)
def _move(tensor, place, block, store):
    row, rows, col, cols, event, inner = place
    if tensor.inner == 1 and event == inner and tensor.row == cols:
        rows, cols = 1, rows * cols  # rows end to end
    if event == inner and tensor.inner != 1 and tensor.row < tensor.inner and rows > 1:  # as x.t()
        first = row * tensor.row + col * tensor.inner
        columns = Lines(tensor.address, first, tensor.inner, tensor.row)
        _move_columns(columns, tensor.kind, rows, block[: rows * cols], store)
        return
    for r in range(rows):
        j = 0
        while j < cols:
            i_outer, i_inner, n = 0, col, cols
            if event != inner:
                i_outer, i_inner = divmod(col + j, inner)
                n = min(inner - i_inner, cols - j)
            first = (row + r) * tensor.row + i_outer * tensor.outer + i_inner * tensor.inner
            run = block[r * cols + j : r * cols + j + n]
            move_run(tensor.address, tensor.kind, first, tensor.inner, run, store)
            j += n


@njit(**JIT)
def _in_memory(tensor, place, like):
    start = tensor.address + (place.row * tensor.row + place.col) * like.itemsize
    return array_at(start, like.dtype.type(0), place.rows * place.cols)


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
    if tensor.address != 0 and _is_block(tensor, place, block):
        return _in_memory(tensor, place, block)
    return block


@njit(**JIT)
def deliver(tensor, place, values):
    """Results that `target` has not put into their tensor yet."""
    if tensor.address != 0 and not _is_block(tensor, place, values):
        _move(tensor, place, values, True)
