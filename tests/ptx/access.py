"""Steps that go beyond a thread's registers: memory, atomics, exchanges within a warp."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import PtxError
from .arithmetic import DTYPES
from .floats import Array
from .memory import check_alignment

WARP = 32
_KINDS = {"global": "u64", "shared": "u32"}
_ALL = slice(None)


def _lanes(mask: Any) -> slice | Array:
    """Those that take part, as an index."""
    return _ALL if mask is True else np.flatnonzero(mask)


class Access:
    """ld or st of one to eight registers at an address of global or shared memory."""

    def __init__(
        self, name: str, space: str, base: int, offset: int, kind: str, slots: list[int]
    ) -> None:
        self.is_load, self.space = name == "ld", space
        self._base, self._offset, self._kind, self._slots = base, offset, kind, slots
        self._dtype = DTYPES[kind]
        self._size = np.dtype(self._dtype).itemsize * len(slots)

    def __call__(self, group: Any, mask: Any) -> None:
        lanes = _lanes(mask)
        addresses = group[_KINDS[self.space]][self._base]
        addresses = np.broadcast_to(addresses, group.size)[lanes].astype(np.int64) + self._offset
        if not len(addresses):
            return
        check_alignment(addresses, self._size)
        rows = [group[self._kind][slot] for slot in self._slots]
        if self.space == "shared":
            _shared(group, lanes, addresses, rows, self._size, self.is_load)
            return
        if group.counts is not None:
            group.counts.request(self.is_load, group.warps[lanes], addresses, self._size)
        stamps = group.stamps[lanes]
        for region, which in group.memory.find(addresses, self._size):
            these = which if lanes is _ALL else lanes[which]
            _move(region, addresses[which], rows, these, self._dtype, self.is_load)
            note = region.read if self.is_load else region.written
            note(group.order, addresses[which], self._size, stamps[which])


def _move(
    region: Any, addresses: Array, rows: list[Array], lanes: Any, dtype: type, is_load: bool
) -> None:
    """Between memory and the registers of these lanes."""
    if is_load:
        values = region.load(addresses, dtype, len(rows))
        for row, value in zip(rows, values.T):
            row[lanes] = value
    else:
        each = [np.broadcast_to(row[lanes] if row.ndim else row, addresses.shape) for row in rows]
        region.store(addresses, np.stack(each, axis=1))


def _shared(
    group: Any, lanes: Any, addresses: Array, rows: list[Array], size: int, is_load: bool
) -> None:
    """Each program has a part of its own."""
    end = int(addresses.max()) + size
    if end > group.shared_size or addresses.min() < 0:
        raise PtxError(f"out of bounds: shared memory up to byte {end} of {group.shared_size}")
    placed = addresses + group.shared_starts[lanes]
    _move(group.shared, placed, rows, lanes, rows[0].dtype.type, is_load)
    note = group.shared.read if is_load else group.shared.written
    note(group.order, placed, size, group.stamps[lanes])


class Atomic:
    """atom.global.add.u32: one thread after another, in a random order."""

    def __init__(
        self, base: int, offset: int, to: int, value: int, *, scope: str, order: str
    ) -> None:
        known = {"relaxed": (), "acquire": ("a",), "release": ("r",), "acq_rel": ("a", "r")}
        if order not in known or scope not in ("gpu", "sys"):
            raise PtxError(f"unknown instruction atom.global.{scope}.{order}")
        self._base, self._offset, self._to, self._value = base, offset, to, value
        self._acquires, self._releases = "a" in known[order], "r" in known[order]

    def __call__(self, group: Any, mask: Any) -> None:
        lanes = np.arange(group.size)[_lanes(mask)].tolist()
        group.random.shuffle(lanes)
        values = np.broadcast_to(group["u32"][self._value], group.size)
        for lane in lanes:
            address = group["u64"][self._base][lane].astype(np.int64)[None] + self._offset
            check_alignment(address, 4)
            ((region, _),) = group.memory.find(address, 4)
            stamp = group.stamps[lane : lane + 1]
            region.read(group.order, address, 4, stamp)
            old = region.load(address, np.uint32, 1)
            region.store(address, old + values[lane])
            group["u32"][self._to][lane] = old[0, 0]
            if self._acquires:
                group.order.acquire(int(stamp[0]), int(address[0]))
            if self._releases:
                group.order.release(int(stamp[0]), int(address[0]))


def _whole_warps(mask: Any) -> None:
    if mask is not True:
        warps = mask.reshape(-1, WARP)
        if (warps.any(1) & ~warps.all(1)).any():
            raise PtxError("a warp comes here without some of its threads")


def shuffle(mode: str, to: int, source: int, by: int, *, clamp: Any) -> Any:
    """shfl.sync of a whole warp: each thread takes another's value, or its own beyond the ends."""
    if mode not in ("bfly", "idx", "up", "down") or clamp != (0 if mode == "up" else WARP - 1):
        raise PtxError(f"unknown instruction shfl.sync.{mode}, clamped to {clamp}")

    def step(group: Any, mask: Any) -> None:
        _whole_warps(mask)
        lane, value = group.lanes % WARP, group["u32"][source]
        by_lanes = group["u32"][by].astype(np.int64)
        other = {
            "bfly": lambda: lane ^ by_lanes,
            "idx": lambda: by_lanes % WARP + 0 * lane,
            "up": lambda: lane - by_lanes,
            "down": lambda: lane + by_lanes,
        }[mode]()
        other = np.where((other >= 0) & (other < WARP), other, lane)
        value = np.broadcast_to(value, group.size)[group.lanes - lane + other]
        np.copyto(group["u32"][to], value, where=mask)

    return step


def warp_sum(to: int, source: int, members: int) -> Any:
    """redux.sync.add of a whole warp: each thread takes the sum, modulo 2^32."""

    def step(group: Any, mask: Any) -> None:
        _whole_warps(mask)
        if (group["u32"][members] != 2**32 - 1).any():
            raise PtxError("redux.sync of less than a warp")
        values = np.broadcast_to(group["u32"][source], group.size).reshape(-1, WARP)
        sums = values.sum(1, dtype=np.uint32)
        np.copyto(group["u32"][to], np.repeat(sums, WARP), where=mask)

    return step


class _Matrix:
    """8 x 8 matrices of 16 bits, a row of 16 bytes at each address: lanes 8 n to 8 n + 7 hold those
    of matrix n, and lane t has two elements of each, of row t // 4.
    """

    is_load: bool

    def __init__(self, base: int, offset: int, slots: list[int]) -> None:
        self._base, self._offset, self._slots = base, offset, slots

    def __call__(self, group: Any, mask: Any) -> None:
        _whole_warps(mask)
        lanes = _lanes(mask)
        thread = np.arange(WARP)
        addresses = np.broadcast_to(group["u32"][self._base], group.size)[lanes]
        given = addresses.astype(np.int64).reshape(-1, WARP) + self._offset
        for n, slot in enumerate(self._slots):
            rows = given[:, 8 * n + thread // 4]
            check_alignment(rows, 16)
            addresses = (rows + 4 * (thread % 4)).ravel()
            if len(addresses):
                _shared(group, lanes, addresses, [group["b32"][slot]], 4, self.is_load)


class LoadMatrix(_Matrix):
    is_load = True


class StoreMatrix(_Matrix):
    is_load = False
