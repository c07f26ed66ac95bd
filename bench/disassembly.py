"""What can be read off compiled kernels: NVIDIA cubins (by triton's cuobjdump) and amdgcn."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)


def _cuobjdump(flag: str, path: str) -> str:
    return subprocess.run(
        [CUOBJDUMP, flag, path], check=True, capture_output=True, text=True
    ).stdout


def narrow_starts(ttir: str) -> int:
    """32-bit products with a program's index: what its rows and columns start at."""
    programs = set(re.findall(r"(%\w+) = tt\.get_program_id", ttir))
    products = re.findall(r"arith\.muli (%\w+), (%\w+)[^\n]*: i32", ttir)
    return sum(bool(programs & set(pair)) for pair in products)


def _loop(instructions: list[tuple[int, str]]) -> list[str]:
    """The body of the longest backward branch: the walk down the rows."""
    first, last = 0, -1
    for address, text in instructions:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and address - int(jump[1], 16) > last - first:
            first, last = int(jump[1], 16), address
    return [text for address, text in instructions if first <= address <= last]


def _barrier_before_atomics(opcodes: list[str]) -> bool:
    """Does a barrier stand between each counter's atomic and the stores before it?"""
    for i, opcode in enumerate(opcodes):
        if re.match(r"(ATOM|RED|global_atomic)", opcode):
            for before in reversed(opcodes[:i]):
                if re.match(r"(BAR|s_barrier)", before):
                    break
                if re.match(r"(STG|global_store|buffer_store)", before):
                    return False
            else:
                return False
    return True


def _count(pattern: str, opcodes: list[str]) -> int:
    return sum(bool(re.match(pattern, opcode)) for opcode in opcodes)


def read_cubin(cubin: bytes, ptx: str) -> dict[str, Any]:
    """Resources and instruction counts of an NVIDIA kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = _cuobjdump("-res-usage", file.name), _cuobjdump("-sass", file.name)
    instructions = [
        (int(address, 16), re.sub(r"^@!?U?P\w+ ", "", text))
        for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)
    ]
    opcodes = [text.split()[0] for _, text in instructions]
    loop = [text.split()[0] for text in _loop(instructions)]
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    multiplies = [
        len(re.findall(rf"mul\.wide\.u32[^;]*, {m - (1 << 32)};", ptx)) for m in PHILOX_MULTIPLIERS
    ]
    return {
        "registers": int(registers),
        "stack": int(stack),
        "local_accesses": _count(r"(LDL|STL)", opcodes),
        "wide_loads": _count(r"LDG.*\.128", loop),
        "loads": _count(r"LDG", loop),
        "wide_stores": _count(r"STG.*\.128", loop),
        "stores": _count(r"STG", loop),
        "atomics": _count(r"(ATOM|RED)", opcodes),
        "barrier_before_atomics": _barrier_before_atomics(opcodes),
        "philox_multiplies": multiplies,
        "calls": len(re.findall(r"\bcall\b", ptx)),
        "ordered_atomics": len(re.findall(r"atom\.global\.gpu\.acq_rel|atom\.acq_rel\.gpu", ptx)),
        "all_atomics": len(re.findall(r"\batom\.", ptx)),
        "uncached_loads": len(re.findall(r"ld\.global\.cg", ptx)),
        "branches_in_loop": _count(r"(BRA|BRX|CALL|BSSY)", loop),
        "loop_instructions": len(loop),
        "instructions": len(opcodes),
    }


def read_amdgcn(text: str) -> dict[str, Any]:
    """Resources and instruction counts of an AMD kernel."""

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    opcodes = re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE)
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "local_accesses": field("vgpr_spill_count"),  # scalar spills stay in vector registers
        "wide_loads": _count(r"(global|buffer)_load_dwordx4", opcodes),
        "loads": _count(r"(global|buffer)_load", opcodes),
        "wide_stores": _count(r"(global|buffer)_store_dwordx4", opcodes),
        "stores": _count(r"(global|buffer)_store", opcodes),
        "atomics": _count(r"global_atomic", opcodes),
        "barrier_before_atomics": _barrier_before_atomics(opcodes),
        "calls": _count(r"s_swappc", opcodes),
        "instructions": len(opcodes),
    }
