"""Happens-before: what one thread writes, another may read only after what orders the two.

Within a program that is a barrier; between programs, a release by one after which the other
acquires at the same address. A thread's turn of execution is a stamp: (program, epoch, thread),
where an epoch is what lies between two barriers of the program.

Left out, so that a race could pass: of several programs that read an address the last alone is
remembered (against a later write). On the safe side: what an atomic acquires counts, for the
program's threads, from its next barrier on.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from . import PtxError
from .floats import Array

_PROGRAM, _EPOCH = 40, 16  # the bits at which they start
_THREADS = (1 << _EPOCH) - 1
NEXT_EPOCH = 1 << _EPOCH
_EPOCHS = (1 << _PROGRAM - _EPOCH) - 1
_SEVERAL = _THREADS  # as a thread: several of the program read it
_CELL = 2  # bytes; no element is smaller
_NOBODY = -1


def stamps(programs: Array, threads: int) -> Array:
    """Those of all threads of these programs at their start: [programs * threads]."""
    first = programs.astype(np.int64)[:, None] << _PROGRAM
    return (first + np.arange(threads)).ravel()


def _epoch(stamp: Array) -> Array:
    return (stamp >> _EPOCH) & _EPOCHS


def describe(stamp: int) -> str:
    """For a message."""
    thread = stamp & _THREADS
    who = "several threads" if thread == _SEVERAL else f"thread {thread}"
    return f"{who} of program {stamp >> _PROGRAM}"


class Order:
    """What each program has seen of each other, in one launch."""

    def __init__(self, programs: int) -> None:
        # seen[a, b]: of b's epochs, those before this are a's past; _one is the same of one thread.
        self._seen = np.zeros((programs, programs), np.int32)
        self._one: dict[int, dict[tuple[int, int], int]] = defaultdict(dict)
        self._published: dict[int, tuple[Array, dict[tuple[int, int], int]]] = {}
        self._pending: dict[int, tuple[Array, dict[tuple[int, int], int]]] = {}

    def before(self, earlier: Array, later: Array) -> Array:
        """Is each of these ordered before its partner?"""
        same_thread = ((earlier ^ later) & ~(_EPOCHS << _EPOCH)) == 0
        a, b = earlier >> _PROGRAM, later >> _PROGRAM
        limit = np.where(a == b, _epoch(later), self._seen[b, a])
        ordered = same_thread | (_epoch(earlier) < limit)
        for i in np.flatnonzero(~ordered & (a != b)):
            thread = int(a[i]), int(earlier[i]) & _THREADS
            ordered[i] = _epoch(earlier[i]) < self._one[int(b[i])].get(thread, 0)
        return ordered

    def release(self, stamp: int, address: int) -> None:
        """What is this thread's past becomes that of who acquires at the address."""
        program, thread, epoch = stamp >> _PROGRAM, stamp & _THREADS, int(_epoch(stamp))
        seen, one = self._published.get(address, (0, {}))
        seen = np.maximum(seen, self._seen[program])
        seen[program] = max(seen[program], epoch)
        one = one | self._one[program] | {(program, thread): epoch + 1}
        self._published[address] = seen, one

    def acquire(self, stamp: int, address: int) -> None:
        """Whatever was released there becomes the program's past at its next barrier."""
        if address in self._published:
            program = stamp >> _PROGRAM
            seen, one = self._published[address]
            before, one_before = self._pending.get(program, (0, {}))
            self._pending[program] = np.maximum(seen, before), one_before | one

    def barrier(self, programs: Array) -> None:
        """These have all their threads at a barrier."""
        for program in programs if self._pending else ():
            seen, one = self._pending.pop(int(program), (0, {}))
            self._seen[program] = np.maximum(self._seen[program], seen)
            self._one[int(program)] |= one


class Shadow:
    """Who wrote and who read each cell of a region last."""

    def __init__(self, size: int) -> None:
        self._cells = -(-size // _CELL)
        self._writers: Array | None = None
        self._readers: Array | None = None
        self._reads: list[tuple[Array, Array]] = []  # not yet among the readers

    def _of(self, offsets: Array, size: int, by: Array) -> tuple[Array, Array]:
        cells = (offsets // _CELL)[:, None] + np.arange(-(-size // _CELL))
        return cells.ravel(), np.repeat(by, cells.shape[1])

    def read(self, order: Order, offsets: Array, size: int, by: Array) -> None:
        """An error if a cell's writer is not in the past."""
        cells, by = self._of(offsets, size, by)
        if self._writers is not None:
            _check(order, self._writers[cells], by, "written")
        self._reads.append((cells, by))

    def write(self, order: Order, offsets: Array, size: int, by: Array) -> None:
        """An error if a cell's writer or reader is not in the past."""
        cells, by = self._of(offsets, size, by)
        if self._writers is None or self._readers is None:
            self._writers = np.full(self._cells, _NOBODY, np.int64)
            self._readers = np.full(self._cells, _NOBODY, np.int64)
        for reads in self._reads:
            _remember(self._readers, *reads)
        self._reads.clear()
        _check(order, self._writers[cells], by, "written")
        _check(order, self._readers[cells], by, "read")
        self._writers[cells] = by
        last = self._writers[cells]
        clash = np.flatnonzero(last >> _PROGRAM != by >> _PROGRAM)
        if len(clash):
            first, second = describe(by[clash[0]]), describe(last[clash[0]])
            raise PtxError(f"race: {first} and {second} write to the same bytes")


def _remember(readers: Array, cells: Array, by: Array) -> None:
    """The last reader, or that there were several threads of a program in one epoch."""
    old = readers[cells]
    readers[cells] = by
    with_others = (old >> _EPOCH == by >> _EPOCH) & (old != by)
    clash = (readers[cells] != by) | with_others
    readers[cells[clash]] |= _SEVERAL


def _check(order: Order, earlier: Array, by: Array, done: str) -> None:
    known = earlier != _NOBODY
    if not known.any():
        return
    earlier, by = earlier[known], by[known]
    wrong = np.flatnonzero(~order.before(earlier, by))
    if len(wrong):
        first, second = int(earlier[wrong[0]]), int(by[wrong[0]])
        raise PtxError(
            f"race: {describe(second)} comes to bytes {done} by {describe(first)}, "
            "and nothing orders the two"
        )
