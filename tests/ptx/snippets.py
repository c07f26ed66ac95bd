"""A few lines of PTX as a kernel, on NumPy arrays."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from .counts import Counts
from .memory import GlobalMemory, Tensor
from .parse import parse
from .schedule import Launch, Program

_MODULE = """
.visible .entry snippet(
{params}
)
.reqntid {threads}
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<19>;
	.reg .b64 	%rd<19>;
{body}
	ret;

}}
"""


def run(
    body: str, *arrays: Any, threads: int = 32, programs: int = 1, shared: int = 0, seed: int = 0
) -> Counts:
    """Execute `body` with the address of arrays[i] in %rd{i} and the thread's number in %r0."""
    names = [f"snippet_param_{i}" for i in range(len(arrays))]
    loads = [f"ld.param.b64 %rd{i}, [{name}];" for i, name in enumerate(names)]
    lines = "\n".join([*loads, "mov.u32 %r0, %tid.x;", body])
    params = ",\n".join(f"\t.param .u64 {name}" for name in names)
    kernel = parse(_MODULE.format(params=params, threads=threads, body=lines))
    addresses = {name: array.ctypes.data for name, array in zip(names, arrays)}
    memory = GlobalMemory(
        Tensor(f"array {i}", array.ctypes.data, array.nbytes) for i, array in enumerate(arrays)
    )
    counts = Counts(kernel, programs)
    turns = random.Random(seed)
    Launch(Program(kernel), (programs, 1, 1), addresses, memory, shared, turns, counts).run()
    return counts


def compute(instruction: str, *operands: Any, result: str = "r") -> np.ndarray:
    """What an instruction makes of arrays, whose operands it calls {0}, {1}, ... and its result
    {to}; the result's bits.
    """
    operands = tuple(np.ascontiguousarray(operand) for operand in operands)
    size = {"rs": 2, "r": 4, "rd": 8}[result]
    out = np.zeros(32, f"u{size}")
    names, lines = [], []
    for i, operand in enumerate((*operands, out)):
        bits = 8 * operand.itemsize
        register = {16: "%rs", 32: "%r", 64: "%rd"}[bits] + str(i + 1 + 9 * (bits == 64))
        lines.append(f"mad.wide.u32 %rd{i}, %r0, {operand.itemsize}, %rd{i};")
        if i < len(operands):
            lines.append(f"ld.global.b{bits} {register}, [%rd{i}];")
        names.append(register)
    lines.append(instruction.format(*names, to=names[-1]))
    lines.append(f"st.global.b{8 * size} [%rd{len(operands)}], {names[-1]};")
    padded = [np.resize(operand, 32) for operand in operands]
    run("\n".join(lines), *padded, out)
    return out[: len(operands[0])]
