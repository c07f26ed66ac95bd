"""An instruction, bound to the registers that it reads and writes: a step.

A step is called with a group of threads that have come to it together and a mask of those that take
part (True: all). A register is a row of the group's, one lane a thread, seen in any type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import PtxError
from .access import Access, Atomic, LoadMatrix, StoreMatrix, shuffle, warp_sum
from .arithmetic import DTYPES, TABLE
from .floats import Array
from .parse import Address, Instruction, Kernel, Operand

Mask = Any  # True, or an array of bool
Step = Callable[[Any, Mask], None]
Rows = dict[str, list[Array]]

SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
_SHARED_MEMORY = "global_smem"  # Triton's name for all of it; it starts at 0
_CACHING = {"cg", "ca"}  # what a hint of these makes faster is not modelled
_JUNK = 0xA5A5_A5A5_A5A5_A5A5  # what registers hold that nothing was written to


def _width(kind: str) -> int:
    return 1 if kind == "pred" else 8 * np.dtype(DTYPES[kind]).itemsize


class Registers:
    """Where each register and constant of a kernel lies among the rows of its width."""

    def __init__(self, kernel: Kernel) -> None:
        self._declared = kernel.registers | dict.fromkeys(SPECIAL, "b32")
        self._slots: dict[str, int] = {}
        self._counts = dict.fromkeys((1, 16, 32, 64), 0)
        for name, kind in self._declared.items():
            width = _width(kind)
            self._slots[name] = self._counts[width]
            self._counts[width] += 1
        self._constants: dict[int, list[int]] = {width: [] for width in self._counts}

    def width(self, register: Operand) -> int:
        """Bits."""
        if not isinstance(register, str) or register not in self._declared:
            raise PtxError(f"{register} is no register")
        return _width(self._declared[register])

    def slot(self, operand: Operand, kind: str) -> int:
        """The index among the rows of this type; constants count from the end."""
        if operand == _SHARED_MEMORY:
            operand = 0
        if isinstance(operand, int):
            constants, value = self._constants[_width(kind)], operand & ((1 << _width(kind)) - 1)
            if value not in constants:
                constants.append(value)
            return -1 - constants.index(value)
        if self.width(operand) != _width(kind):
            raise PtxError(f"{operand} is taken as {kind}")
        return self._slots[operand]

    def rows(self, lanes: int) -> Rows:
        """Registers for so many threads; all steps must be bound before."""
        memory: dict[int, tuple[Array, Array]] = {}
        for width, count in self._counts.items():
            plain = np.dtype(bool) if width == 1 else np.dtype(f"u{width // 8}")
            junk = True if width == 1 else _JUNK & ((1 << width) - 1)
            constants = np.array(self._constants[width][::-1], plain)
            memory[width] = np.full((count, lanes), junk, plain), constants
        rows: Rows = {}
        views: Rows = {}
        for kind, dtype in DTYPES.items():
            name = np.dtype(dtype).name
            if name not in views:
                registers, constants = memory[_width(kind)]
                views[name] = list(registers.view(dtype))
                views[name] += [constants.view(dtype)[i, ...] for i in range(len(constants))]
            rows[kind] = views[name]
        return rows

    def part(self, rows: Rows, lanes: slice) -> Rows:
        """Some of the threads; the same memory."""
        done: dict[int, list[Array]] = {}
        for listed in rows.values():
            if id(listed) not in done:
                done[id(listed)] = [row[lanes] if row.ndim else row for row in listed]
        return {kind: done[id(listed)] for kind, listed in rows.items()}


def bind(instruction: Instruction, registers: Registers) -> list[Step]:
    """The steps of an instruction that does not jump."""
    try:
        steps = _steps(instruction, registers)
    except PtxError as error:
        raise PtxError(f"{error}, in {instruction}") from None
    if instruction.guard is None:
        return steps
    name, value = instruction.guard
    slot = registers.slot(name, "pred")
    return [_guarded(step, slot, value) for step in steps]


def _guarded(step: Step, slot: int, value: bool) -> Step:
    def guarded(group: Any, mask: Mask) -> None:
        predicate = group["pred"][slot]
        step(group, (predicate if value else ~predicate) & mask)

    return guarded


def _steps(instruction: Instruction, registers: Registers) -> list[Step]:
    opcode, operands = instruction.opcode, instruction.operands
    parts = opcode.split(".")
    if parts[0] == "mov" and isinstance(operands[0], tuple):
        return _unpack(parts[1], operands, registers)
    if parts[0] == "mov" and isinstance(operands[1], tuple):
        return [_pack(parts[1], operands, registers)]
    if parts[0] == "setp" and parts[-1] in ("bf16x2", "f16x2"):
        return _compare_halves(parts[1], parts[2].removesuffix("x2"), operands, registers)
    if opcode in TABLE:
        return [_arithmetic(opcode, operands, registers)]
    if parts[:2] == ["ld", "param"]:
        return [_parameter(parts[2], operands, registers)]
    if parts[0] in ("ld", "st"):
        return [_access(parts, operands, registers)]
    if parts[:2] == ["atom", "global"] and parts[4:] == ["add", "u32"]:
        base, offset = _address(operands[1], "b64", registers)
        slots = (registers.slot(operands[i], "u32") for i in (0, 2))
        return [Atomic(base, offset, *slots, scope=parts[2], order=parts[3])]
    if parts[:2] == ["shfl", "sync"] and parts[3:] == ["b32"] and operands[4] == -1:
        slots = (registers.slot(operand, "u32") for operand in operands[:3])
        return [shuffle(parts[2], *slots, clamp=operands[3])]
    if opcode in ("redux.sync.add.s32", "redux.sync.add.u32"):
        return [warp_sum(*(registers.slot(operand, "u32") for operand in operands))]
    matrix = {"ldmatrix": LoadMatrix, "stmatrix": StoreMatrix}.get(parts[0])
    if matrix and parts[1:4] == ["sync", "aligned", "m8n8"] and parts[5:] == ["shared", "b16"]:
        values, address = operands if parts[0] == "ldmatrix" else operands[::-1]
        slots = [registers.slot(value, "b32") for value in values]
        return [matrix(*_address(address, "b32", registers), slots)]
    raise PtxError(f"unknown instruction {opcode}")


def _arithmetic(opcode: str, operands: tuple[Operand, ...], registers: Registers) -> Step:
    function, sources, result = TABLE[opcode]
    if len(operands) != 1 + len(sources):
        raise PtxError(f"{len(operands)} operands")
    to = registers.slot(operands[0], result)
    if to < 0:
        raise PtxError(f"{operands[0]} is no register")
    at = [registers.slot(operand, kind) for operand, kind in zip(operands[1:], sources)]
    whole = isinstance(function, np.ufunc)

    # The same thrice: unpacking a list of any length would take as long as the operation.
    if len(at) == 1:
        (kind,), (i,) = sources, at

        def step(group: Any, mask: Mask) -> None:
            if whole:
                function(group[kind][i], out=group[result][to], where=mask)
            else:
                np.copyto(group[result][to], function(group[kind][i]), where=mask)

    elif len(at) == 2:
        (kind, kind2), (i, j) = sources, at

        def step(group: Any, mask: Mask) -> None:
            x, y = group[kind][i], group[kind2][j]
            if whole:
                function(x, y, out=group[result][to], where=mask, casting="same_kind")
            else:
                np.copyto(group[result][to], function(x, y), where=mask)

    else:
        (kind, kind2, kind3), (i, j, k) = sources, at

        def step(group: Any, mask: Mask) -> None:
            value = function(group[kind][i], group[kind2][j], group[kind3][k])
            np.copyto(group[result][to], value, where=mask)

    return step


def _unpack(kind: str, operands: tuple[Operand, ...], registers: Registers) -> list[Step]:
    """mov.b64 {low, high}, x"""
    parts, source = operands
    bits = int(kind[1:]) // len(parts)
    steps = []
    for n, part in enumerate(parts):
        if part != "_":
            steps.append(_part(registers.slot(source, kind), kind, n * bits,
                               registers.slot(part, f"b{bits}"), f"b{bits}"))  # fmt: skip
    return steps


def _part(source: int, kind: str, shift: int, to: int, result: str) -> Step:
    dtype = DTYPES[result]

    def step(group: Any, mask: Mask) -> None:
        part = group[kind][source] >> DTYPES[kind](shift)
        np.copyto(group[result][to], part.astype(dtype), where=mask)

    return step


def _pack(kind: str, operands: tuple[Operand, ...], registers: Registers) -> Step:
    """mov.b64 x, {low, high}"""
    to, parts = operands
    bits, dtype = int(kind[1:]) // len(parts), DTYPES[kind]
    slots, to = [registers.slot(part, f"b{bits}") for part in parts], registers.slot(to, kind)

    def step(group: Any, mask: Mask) -> None:
        whole = dtype(0)
        for n, slot in enumerate(slots):
            whole = whole | (group[f"b{bits}"][slot].astype(dtype) << dtype(n * bits))
        np.copyto(group[kind][to], whole, where=mask)

    return step


def _compare_halves(
    name: str, kind: str, operands: tuple[Operand, ...], registers: Registers
) -> list[Step]:
    """setp.lt.bf16x2 low|high, x, y"""
    to, *sources = operands
    if not isinstance(to, str) or to.count("|") != 1 or f"setp.{name}.{kind}" not in TABLE:
        raise PtxError(f"unknown instruction setp.{name}.{kind}x2")
    function = TABLE[f"setp.{name}.{kind}"].function
    at = [registers.slot(source, "b32") for source in sources]

    def compare(slot: int, shift: int) -> Step:
        def step(group: Any, mask: Mask) -> None:
            halves = ((group["b32"][i] >> np.uint32(shift)).astype(np.uint16) for i in at)
            x, y = (half.view(DTYPES[kind]) for half in halves)
            np.copyto(group["pred"][slot], function(x, y), where=mask)

        return step

    return [compare(registers.slot(name, "pred"), 16 * n) for n, name in enumerate(to.split("|"))]


def _parameter(kind: str, operands: tuple[Operand, ...], registers: Registers) -> Step:
    """A register may be wider than what it loads: the sign, or zeros, fill it up."""
    register, address = operands
    if not isinstance(address, Address) or address.offset:
        raise PtxError("a parameter of several words")
    name, result = address.base, f"b{registers.width(register)}"
    to, bits = registers.slot(register, result), int(kind[1:])

    def step(group: Any, mask: Mask) -> None:
        value = group.params[name] & ((1 << bits) - 1)
        if kind[0] == "s" and value >> (bits - 1):
            value -= 1 << bits
        value &= (1 << int(result[1:])) - 1
        np.copyto(group[result][to], DTYPES[result](value), where=mask)

    return step


def _address(operand: Operand, kind: str, registers: Registers) -> tuple[int, int]:
    """(slot, bytes beyond it)."""
    if not isinstance(operand, Address):
        raise PtxError(f"{operand} is no address")
    return registers.slot(operand.base, kind), operand.offset


def _access(parts: list[str], operands: tuple[Operand, ...], registers: Registers) -> Step:
    space, kind = parts[1].split("::")[0], parts[-1]
    hints = [part for part in parts[2:-1] if part not in ("v2", "v4", "v8")]
    if space not in ("global", "shared") or not set(hints) <= _CACHING or len(parts) < 3:
        raise PtxError(f"unknown instruction {'.'.join(parts)}")
    values, address = operands if parts[0] == "ld" else operands[::-1]
    values = values if isinstance(values, tuple) else (values,)
    count = next((int(part[1:]) for part in parts[2:-1] if part[0] == "v"), 1)
    bits = int(kind[1:])
    if len(values) != count or bits < 16:
        raise PtxError(f"unknown instruction {'.'.join(parts)}")
    slots = [registers.slot(value, f"b{bits}") for value in values]
    base, offset = _address(address, "b64" if space == "global" else "b32", registers)
    return Access(parts[0], space, base, offset, f"b{bits}", slots)
