"""What a launch did, for tests and benchmarks: instructions, waits for memory, sectors.

A load step is a wait: an instruction takes a value that a load of global memory has not yet
brought. All loads that were under way by then have arrived with it. So loads that do not depend on
each other are one step, and each round of a loop that uses what it loads is one more.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .floats import Array
from .parse import Address, Instruction, Kernel, Operand

SECTOR = 32  # bytes


class Counts:
    """Of one launch; `instructions` and `load_steps` by program, in the order of the grid."""

    def __init__(self, kernel: Kernel, programs: int) -> None:
        self.instructions = np.zeros(programs, np.int64)
        self.load_steps = np.zeros(programs, np.int64)
        self.last = 0  # the program that executed something last
        self._requests = {True: 0, False: 0}
        self._sectors = {True: 0, False: 0}
        self._lengths = [len(block) for block in kernel.blocks]
        self._blocks = [[_Loads(instruction) for instruction in b] for b in kernel.blocks]
        self._steps: dict[tuple[int, frozenset[str]], tuple[int, frozenset[str]]] = {}
        self._coming = [frozenset[str]()] * programs

    def sectors_per_request(self, loads: bool) -> float:
        """Of a warp's loads, or stores, of global memory."""
        return self._sectors[loads] / max(self._requests[loads], 1)

    def executed(self, place: int, programs: Array, which: Array | bool) -> None:
        """These programs had threads in this block."""
        chosen = programs if which is True else programs[which]
        self.instructions[chosen] += self._lengths[place]
        for program in chosen.tolist():
            steps, self._coming[program] = self._waits(place, self._coming[program])
            self.load_steps[program] += steps
            self.last = program

    def _waits(self, place: int, coming: frozenset[str]) -> tuple[int, frozenset[str]]:
        """How often a block waits, and what is under way at its end."""
        key = place, coming
        if key not in self._steps:
            steps, under_way = 0, set(coming)
            for loads in self._blocks[place]:
                if under_way & loads.uses:
                    steps += 1
                    under_way.clear()
                under_way -= loads.writes
                under_way |= loads.brings
            self._steps[key] = steps, frozenset(under_way)
        return self._steps[key]

    def request(self, is_load: bool, warps: Array, addresses: Array, size: int) -> None:
        """One instruction of some warps' threads; an access does not cross sectors."""
        sectors = addresses // SECTOR
        self._requests[is_load] += len(np.unique(warps))
        pairs = np.stack([warps, sectors], axis=1)
        self._sectors[is_load] += len(np.unique(pairs, axis=0)) * max(1, size // SECTOR)


class _Loads:
    """Registers that an instruction uses, writes, and loads from global memory."""

    def __init__(self, instruction: Instruction) -> None:
        stores = instruction.opcode.split(".")[0] in ("st", "bra", "bar", "stmatrix")
        first = [] if stores else instruction.operands[:1]
        others = instruction.operands if stores else instruction.operands[1:]
        self.writes = {name for operand in first for name in _names(operand)}
        self.uses = {name for operand in others for name in _names(operand)}
        if instruction.guard is not None:
            self.uses.add(instruction.guard[0])
        self.brings = self.writes if instruction.opcode.startswith("ld.global") else set()


def _names(operand: Operand) -> Iterator[str]:
    if isinstance(operand, Address):
        yield from _names(operand.base)
    elif isinstance(operand, tuple):
        for part in operand:
            yield from _names(part)
    elif isinstance(operand, str):
        yield operand
