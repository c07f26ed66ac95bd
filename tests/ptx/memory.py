"""Memory in regions: an address is in one of them, aligned, or the access is an error."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from . import PtxError
from .floats import Array
from .races import Order, Shadow

#: No access of one thread is wider, so that a view of this alignment serves all.
_WIDEST = 64


class Region:
    """A tensor's storage, or the shared memory of programs that run together."""

    def __init__(self, name: str, start: int, size: int, data: Array, origin: int) -> None:
        self.name, self.start, self.size = name, start, size
        self._origin = origin  # the address of the data's first byte, which may lie before start
        self._data = data
        self.shadow = Shadow(len(data))

    def _elements(self, addresses: Array, dtype: type, count: int) -> tuple[Array, Array]:
        """Rows of as many elements as one access has, and which of them are meant."""
        bytes_each = np.dtype(dtype).itemsize * count
        rows = self._data.view(dtype).reshape(-1, count)
        return rows, (addresses - self._origin) // bytes_each

    def load(self, addresses: Array, dtype: type, count: int) -> Array:
        """[addresses, count]"""
        rows, index = self._elements(addresses, dtype, count)
        return rows[index]

    def store(self, addresses: Array, values: Array) -> None:
        """Values are [addresses, count]. Several threads may write one value, as Triton has it."""
        rows, index = self._elements(addresses, values.dtype.type, values.shape[1])
        rows[index] = values
        if (rows[index] != values).any():
            raise PtxError(f"race: threads write different values to the same bytes of {self.name}")

    def read(self, order: Order, addresses: Array, size: int, stamps: Array) -> None:
        """Note, and check, who reads."""
        self.shadow.read(order, addresses - self._origin, size, stamps)

    def written(self, order: Order, addresses: Array, size: int, stamps: Array) -> None:
        """Note, and check, who writes."""
        self.shadow.write(order, addresses - self._origin, size, stamps)


def shared_region(size: int) -> Region:
    """Memory of nobody's values yet."""
    data = np.full(-(-size // _WIDEST) * _WIDEST, 0xCD, np.uint8)
    return Region("shared memory", 0, size, data, 0)


class Tensor(NamedTuple):
    """What a pointer's argument may reach: a whole storage."""

    name: str
    start: int
    size: int


def _region(tensor: Tensor) -> Region:
    name, start, size = tensor
    origin = start // _WIDEST * _WIDEST  # same page: addressable, though never accessed
    length = -(-(start + size - origin) // _WIDEST) * _WIDEST
    data = np.frombuffer((ctypes.c_uint8 * length).from_address(origin), np.uint8)
    return Region(name, start, size, data, origin)


class GlobalMemory:
    """The storages that a launch was given; what lies between them is nobody's."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        merged: list[Tensor] = []
        for tensor in sorted((t for t in tensors if t.size), key=lambda t: t.start):
            last = merged[-1] if merged else None
            if last is not None and tensor.start < last.start + last.size:
                end = max(last.start + last.size, tensor.start + tensor.size)
                names = last.name if tensor.name in last.name else f"{last.name}, {tensor.name}"
                merged[-1] = Tensor(names, last.start, end - last.start)
            else:
                merged.append(tensor)
        self._regions = [_region(tensor) for tensor in merged]
        self._starts = [region.start for region in self._regions]

    def find(self, addresses: Array, size: int) -> list[tuple[Region, slice | Array]]:
        """The regions of these accesses, and which accesses are in each."""
        low, high = int(addresses.min()), int(addresses.max())
        region = self._region_of(low, size)
        if region is self._region_of(high, size):
            return [(region, slice(None))]
        starts = [self._region_of(int(address), size).start for address in addresses]
        each = np.array([self._starts.index(start) for start in starts])
        return [(self._regions[i], np.flatnonzero(each == i)) for i in np.unique(each)]

    def _region_of(self, address: int, size: int) -> Region:
        i = bisect_right(self._starts, address) - 1
        region = self._regions[i] if i >= 0 else None
        if region is None:
            raise PtxError(f"out of bounds: {size} bytes at {address:#x}, before every tensor")
        offset = address - region.start
        if offset + size > region.size:
            raise PtxError(
                f"out of bounds: {size} bytes at byte {offset} of {region.name}, "
                f"which has {region.size}"
            )
        return region


def check_alignment(addresses: Array, size: int) -> None:
    """An access of several elements is aligned to all of it."""
    wrong = addresses % size
    if wrong.any():
        raise PtxError(f"misaligned: {size} bytes at {wrong.max()} past a multiple of {size}")
