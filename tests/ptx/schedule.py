"""A launch: programs take turns, from one barrier or atomic to the next.

Programs that are at the same place go on together, as lanes of the same arrays: what they do until
then is either ordered with what the others do, or a race that is reported whatever the order. At an
atomic a random few go first. Threads that branch apart go on lowest place first, and so meet again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from . import PtxError
from .access import WARP
from .counts import Counts
from .floats import Array
from .instructions import Registers, Rows, Step, bind
from .memory import GlobalMemory, Region, shared_region
from .parse import Instruction, Kernel
from .races import NEXT_EPOCH, Order, stamps

#: Of threads that are resident together; one program at least.
LANES = 4096
#: Places that a program may come to; more is an endless loop.
MOST_BLOCKS = 1_000_000
_ALIGNED = 128  # where each program's shared memory starts


class Block(NamedTuple):
    """Steps, then at most one jump."""

    steps: list[Step]
    origins: list[Instruction]  # of each step
    jump: str  # bra, ret, bar, or none
    guard: tuple[int, bool] | None  # of the jump
    target: int
    has_atomic: bool


class Program:
    """A kernel, ready to run."""

    def __init__(self, kernel: Kernel) -> None:
        if kernel.threads % WARP:
            raise PtxError(f"{kernel.threads} threads are no whole number of warps")
        self.kernel, self.registers = kernel, Registers(kernel)
        self.blocks = [self._block(block) for block in kernel.blocks]

    def _block(self, instructions: list[Instruction]) -> Block:
        last = instructions[-1]
        jump = last.opcode.split(".")[0]
        target, guard = 0, None
        if jump == "bra":
            target = self.kernel.labels[str(last.operands[0])]
        elif last.opcode in ("ret", "exit"):
            jump = "ret"
        elif jump == "bar":
            if last.opcode != "bar.sync" or last.operands != (0,) or last.guard:
                raise PtxError(f"unknown instruction {last}")
        else:
            jump = "none"
        if jump != "none" and last.guard is not None:
            guard = self.registers.slot(last.guard[0], "pred"), last.guard[1]
        steps: list[Step] = []
        origins: list[Instruction] = []
        for instruction in instructions if jump == "none" else instructions[:-1]:
            bound = bind(instruction, self.registers)
            steps += bound
            origins += [instruction] * len(bound)
        return Block(steps, origins, jump, guard, target, last.opcode.startswith("atom"))


class Launch(NamedTuple):
    """What a grid of programs is given."""

    program: Program
    grid: tuple[int, int, int]
    params: Mapping[str, int]  # their bits
    memory: GlobalMemory
    shared_size: int
    random: random.Random
    counts: Counts | None = None

    def run(self) -> None:
        """Every program, in a random order."""
        count = self.grid[0] * self.grid[1] * self.grid[2]
        order, waiting = Order(count), list(range(count))
        self.random.shuffle(waiting)
        together = max(1, LANES // self.program.kernel.threads)
        with np.errstate(all="ignore"):
            for start in range(0, count, together):
                _Wave(self, order, np.array(waiting[start : start + together])).run()


class Group(dict[str, Any]):
    """Threads that run together: the rows of their registers by type, and all that steps ask."""

    def __init__(self, rows: Rows, wave: _Wave, lanes: slice) -> None:
        super().__init__(rows)
        launch = wave.launch
        self.params, self.memory, self.random = launch.params, launch.memory, launch.random
        self.counts, self.order = launch.counts, wave.order
        self.shared, self.shared_size = wave.shared, launch.shared_size
        self.shared_starts = wave.shared_starts[lanes]
        self.stamps, self.places = wave.stamps[lanes], wave.places[lanes]
        self.waiting, self.warps = wave.waiting[lanes], wave.warps[lanes]
        self.size = len(self.stamps)
        self.lanes = np.arange(self.size)


class _Wave:
    """Programs that are resident together; each has as many lanes as a program has threads."""

    def __init__(self, launch: Launch, order: Order, programs: Array) -> None:
        self.launch, self.order, self.programs = launch, order, programs
        kernel = launch.program.kernel
        self.threads, self.end = kernel.threads, len(kernel.blocks)
        size = len(programs) * self.threads
        each = -(-launch.shared_size // _ALIGNED) * _ALIGNED
        self.shared: Region = shared_region(each * len(programs))
        self.shared_starts = np.repeat(np.arange(len(programs)) * each, self.threads)
        self.stamps = stamps(programs, self.threads)
        self.warps = np.arange(size) // WARP
        self.places = np.zeros(size, np.int64)
        self.waiting = np.zeros(size, bool)
        self.alive = np.ones(len(programs), bool)
        self.passed = 0
        self.rows = launch.program.registers.rows(size)
        self._fill_special()
        self.whole = Group(self.rows, self, slice(None))
        self._alone: dict[int, Group] = {}

    def _fill_special(self) -> None:
        x, y, _ = grid = self.launch.grid
        ids = self.programs % x, self.programs // x % y, self.programs // (x * y)
        slot = self.launch.program.registers.slot
        for i, axis in enumerate("xyz"):
            values = {
                "tid": np.tile(np.arange(self.threads) * (i == 0), len(self.programs)),
                "ntid": self.threads if i == 0 else 1,
                "ctaid": np.repeat(ids[i], self.threads),
                "nctaid": grid[i],
            }
            for name, value in values.items():
                self.rows["u32"][slot(f"%{name}.{axis}", "u32")][:] = value

    def run(self) -> None:
        """Until every program has ended."""
        while self.alive.any():
            at = self.places.reshape(-1, self.threads).min(1)
            place = at[self.launch.random.choice(np.flatnonzero(self.alive).tolist())]
            ready = np.flatnonzero(self.alive & (at == place)).tolist()
            if self.launch.program.blocks[place].has_atomic and len(ready) > 1:
                ready = self.launch.random.sample(
                    ready, self.launch.random.randrange(1, len(ready) + 1)
                )
            self._turn(ready)

    def _turn(self, chosen: list[int]) -> None:
        """These programs go on until each is past a barrier, before an atomic, or at its end."""
        if len(chosen) == len(self.programs):
            _Turn(self, self.whole, True, self.programs).run()
        elif len(chosen) == 1:
            (i,) = chosen
            if i not in self._alone:
                lanes = slice(i * self.threads, (i + 1) * self.threads)
                rows = self.launch.program.registers.part(self.rows, lanes)
                self._alone[i] = Group(rows, self, lanes)
            _Turn(self, self._alone[i], True, self.programs[i : i + 1]).run()
        else:
            each = np.zeros(len(self.programs), bool)
            each[chosen] = True
            _Turn(self, self.whole, np.repeat(each, self.threads), self.programs[each]).run()
        for i in chosen:
            places = self.places[i * self.threads : (i + 1) * self.threads]
            self.alive[i] = bool((places < self.end).any())


class _Turn:
    """A group, or those of its lanes that are meant, on its way."""

    def __init__(self, wave: _Wave, group: Group, meant: Any, programs: Array) -> None:
        self.wave, self.group, self.meant, self.programs = wave, group, meant, programs
        self.launch, self.end = wave.launch, wave.end

    def _among(self, lanes: Array) -> Array:
        """Of the lanes meant: [programs, threads]."""
        return (lanes if self.meant is True else lanes[self.meant]).reshape(-1, self.wave.threads)

    def run(self) -> None:
        """Block after block; as long as all threads are at one place, without looking where."""
        together, started = self._common_place(), False
        while True:
            if together is not None:
                place, mask = together, self.meant
                if place == self.end:
                    return self._move(self.meant, place)
            else:
                live = ~self.group.waiting & (self.group.places < self.end) & self.meant
                if not live.any():
                    return self._release()
                place = int(self.group.places[live].min())
                mask = live & (self.group.places == place)
            block = self.launch.program.blocks[place]
            if block.has_atomic and started and together is not None:
                return self._move(mask, place)
            started = True
            self._execute(block, place, mask)
            if block.jump == "bar":
                self._move(mask, place + 1)
                if together is not None:
                    return self._barrier(self.programs, mask)
                self.group.waiting |= mask
                continue
            following = self._following(block, place, mask)
            if together is not None and following is not None:
                together = following
                continue
            if following is not None:
                self._move(mask, following)
            together = self._common_place()

    def _move(self, mask: Any, place: int) -> None:
        if mask is True:
            self.group.places[:] = place
        else:
            self.group.places[mask] = place

    def _common_place(self) -> int | None:
        if self._among(self.group.waiting).any():
            return None
        places = self._among(self.group.places).ravel()
        first = places[0]
        return int(first) if (places == first).all() else None

    def _execute(self, block: Block, place: int, mask: Any) -> None:
        wave = self.wave
        wave.passed += 1
        if wave.passed > MOST_BLOCKS:
            raise PtxError(f"{self.launch.program.kernel.name} does not end")
        counts, group = self.launch.counts, self.group
        if counts is not None:
            which = True if mask is True else self._among(mask).any(1)
            counts.executed(place, self.programs, which)
        try:
            for step in block.steps:
                step(group, mask)
        except PtxError as error:
            name, where = self.launch.program.kernel.name, block.origins[block.steps.index(step)]
            raise PtxError(f"{name}: {error}, in {where}") from None

    def _following(self, block: Block, place: int, mask: Any) -> int | None:
        """Where all of these threads go, or None: they have been moved to several places."""
        target = {"bra": block.target, "ret": self.end}.get(block.jump, place + 1)
        if block.guard is None:
            return target
        slot, value = block.guard
        predicate = self.group["pred"][slot]
        jumps = (predicate if value else ~predicate) & mask
        if not jumps.any():
            return place + 1
        if (jumps if mask is True else jumps == mask).all():
            return target
        self._move(mask, place + 1)
        self._move(jumps, target)
        return None

    def _barrier(self, programs: Array, lanes: Any) -> None:
        self.group.stamps[() if lanes is True else lanes] += NEXT_EPOCH
        self.wave.order.barrier(programs)

    def _release(self) -> None:
        """No thread can go on: they wait for each other, or for some that have left."""
        waiting = self._among(self.group.waiting)
        full, some = waiting.all(1), waiting.any(1)
        if (some & ~full).any():
            program = self.programs[np.flatnonzero(some & ~full)[0]]
            raise PtxError(
                f"{self.launch.program.kernel.name}: threads of program {program} wait at a "
                "barrier that others have passed by"
            )
        self._barrier(self.programs[full], self.group.waiting & self.meant)
        self.group.waiting[() if self.meant is True else self.meant] = False
