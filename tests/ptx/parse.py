"""PTX text → a kernel: its parameters, its registers, its basic blocks of instructions."""

from __future__ import annotations

import re
from typing import NamedTuple

from . import PtxError


class Address(NamedTuple):
    """[base + offset]"""

    base: Operand
    offset: int


#: A register, label or symbol; an integer or the bits of a float; {several}; an address.
Operand = str | int | tuple["Operand", ...] | Address


class Instruction(NamedTuple):
    """One statement; `guard` is a predicate and the value of it that lets a thread take part."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None
    text: str
    place: str

    def __str__(self) -> str:
        return f"`{self.text}` ({self.place})"


class Kernel(NamedTuple):
    """What one .entry holds. The last instruction of a block may jump; no other does."""

    name: str
    params: dict[str, str]  # their types
    threads: int
    registers: dict[str, str]  # their types: pred, b16, b32, b64
    blocks: list[list[Instruction]]
    labels: dict[str, int]  # the block that each starts


#: After these a block ends. An atomic has one of its own: programs may take turns there.
JUMPS = ("bra", "ret", "exit", "bar", "atom")

_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)([^{]*)\{(.*?)\n\}", re.DOTALL)
_PARAM = re.compile(r"\.param \.(\w+)[^,\n]*?(\w+_param_\d+)")
_SOURCE = re.compile(r"\.loc\s.*// ([\w.]+:\d+)")
_LABEL = re.compile(r"(\$\w+):$")
_SCOPE = re.compile(r"\{\s*(\.reg .*;)\s*\}$")  # registers of one line's own
_GUARD = re.compile(r"@(!?)(%\w+)\s+(.*)$")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%?\w+)(?:<(\d+)>)?$")


def parse(text: str) -> Kernel:
    """The one kernel of a module."""
    entry = _ENTRY.search(text)
    threads = re.search(r"\.reqntid (\d+)", entry[3]) if entry else None
    if entry is None or threads is None:
        raise PtxError("no kernel with a known number of threads")
    first_line = text[: entry.start(4)].count("\n") + 1
    body = _Body()
    for number, line in enumerate(entry[4].split("\n"), first_line):
        body.add(line, number)
    body.close()
    params = {name: kind for kind, name in _PARAM.findall(entry[2])}
    return Kernel(entry[1], params, int(threads[1]), body.registers, body.blocks, body.labels)


class _Body:
    """The blocks so far."""

    def __init__(self) -> None:
        self.blocks: list[list[Instruction]] = []
        self.labels: dict[str, int] = {}
        self.registers: dict[str, str] = {}
        self._current: list[Instruction] = []
        self._source = ""

    def close(self) -> None:
        """End the current block."""
        if self._current:
            self.blocks.append(self._current)
            self._current = []

    def add(self, line: str, number: int) -> None:
        """Statements of a line, or what it says about those that follow."""
        source = _SOURCE.search(line)
        if source:
            self._source = f", {source[1]}"
        line = line.split("//")[0].strip()
        label = _LABEL.match(line)
        if label:
            self.close()
            self.labels[label[1]] = len(self.blocks)
            return
        if not line or (line[0] == "." and not line.startswith(".reg")):
            return
        scope = _SCOPE.match(line)
        if scope:
            line = scope[1]
        if line[-1] != ";":
            raise PtxError(f"line {number} is no statement: {line}")
        for statement in line[:-1].split(";"):
            self._statement(" ".join(statement.split()), f"line {number} of the PTX{self._source}")

    def _statement(self, text: str, place: str) -> None:
        declared = _REGISTERS.match(text)
        if declared:
            kind, name, count = declared.groups()
            names = [name] if count is None else [f"{name}{i}" for i in range(int(count))]
            self.registers.update(dict.fromkeys(names, kind))
            return
        guarded = _GUARD.match(text)
        guard = (guarded[2], not guarded[1]) if guarded else None
        opcode, _, rest = (guarded[3] if guarded else text).partition(" ")
        operands = tuple(_operand(part) for part in _parts(rest))
        instruction = Instruction(opcode, operands, guard, text, place)
        kind = opcode.split(".")[0]
        if kind == "atom":
            self.close()
        self._current.append(instruction)
        if kind in JUMPS:
            self.close()


def _parts(text: str) -> list[str]:
    """Split at the commas that are in no brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", text)
    return [part.strip() for part in parts]


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return tuple(_operand(part) for part in _parts(text[1:-1]))
    if text[0] == "[":
        base, _, offset = text[1:-1].partition("+")
        return Address(_operand(base.strip()), int(offset or "0", 0))
    if text[:2] in ("0f", "0d"):
        return int(text[2:], 16)
    if re.match(r"-?\d", text):
        return int(text.rstrip("U"), 0)
    return text
