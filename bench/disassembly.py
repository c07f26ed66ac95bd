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
    """The walk down the rows: the first loop, all of it. Those of the last program follow."""
    first, last = 0, -1
    for address, text in instructions:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        target = int(jump[1], 16) if jump else address
        if target < address and (last < 0 or target <= first):
            first, last = target, address
    return [text for address, text in instructions if first <= address <= last]


BARRIER = (r"BAR",)
# On gfx9 a wave's stores pass the barrier unless it waits for them before.
AMD_BARRIER = (r"s_barrier", r"s_waitcnt\b.*vmcnt\(0\)")


def _barrier_before_atomics(instructions: list[str], steps: tuple[str, ...]) -> bool:
    """Do these stand, last first, between each counter's atomic and the stores before it?"""
    for i, instruction in enumerate(instructions):
        if re.match(r"(ATOM|RED|global_atomic)", instruction):
            left = list(steps)
            for before in reversed(instructions[:i]):
                if re.match(left[0], before):
                    left.pop(0)
                    if not left:
                        break
                elif re.match(r"(STG|global_store|buffer_store)", before):
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
        "half_wide_loads": _count(r"LDG.*\.64", loop),
        "loads": _count(r"LDG", loop),
        "wide_stores": _count(r"STG.*\.128", loop),
        "half_wide_stores": _count(r"STG.*\.64", loop),
        "stores": _count(r"STG", loop),
        "barriers_in_loop": _count(r"BAR", loop),
        "atomics": _count(r"(ATOM|RED)", opcodes),
        "barrier_before_atomics": _barrier_before_atomics(opcodes, BARRIER),
        "philox_multiplies": multiplies,
        "calls": len(re.findall(r"\bcall\b", ptx)),
        "inexact_divisions": len(re.findall(r"\bdiv\.(?:full|approx)", ptx)),
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

    instructions = re.findall(r"^\s+([a-z]\w+[^;\n]*)", text, re.MULTILINE)
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "local_accesses": field("vgpr_spill_count"),  # scalar spills stay in vector registers
        "wide_loads": _count(r"(global|buffer)_load_dwordx4", instructions),
        "half_wide_loads": _count(r"(global|buffer)_load_dwordx2", instructions),
        "loads": _count(r"(global|buffer)_load", instructions),
        "wide_stores": _count(r"(global|buffer)_store_dwordx4", instructions),
        "half_wide_stores": _count(r"(global|buffer)_store_dwordx2", instructions),
        "stores": _count(r"(global|buffer)_store", instructions),
        "atomics": _count(r"global_atomic", instructions),
        "barrier_before_atomics": _barrier_before_atomics(instructions, AMD_BARRIER),
        "calls": _count(r"s_swappc", instructions),
        "instructions": len(instructions),
    }
