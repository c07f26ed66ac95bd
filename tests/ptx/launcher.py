"""Behind Triton's launch: kernels compile for a GPU that is not there, and their PTX is executed.

`use` makes it Triton's driver for the rest of the process, which must be without TRITON_INTERPRET.
"""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import triton
from triton.backends import backends

from paths import BENCH

from .counts import Counts
from .memory import GlobalMemory, Tensor
from .parse import parse
from .schedule import Launch, Program

sys.path.append(str(BENCH))
import stub_driver

#: Decides which program goes first; tests seed it.
turns = random.Random(0)

_programs: dict[bytes, Program] = {}
_recorded: list[list[tuple[str, Counts]]] = []  # the lists being filled


@contextmanager
def recorded() -> Iterator[list[tuple[str, Counts]]]:
    """The launches made inside, (kernel, counts) each."""
    launches: list[tuple[str, Counts]] = []
    _recorded.append(launches)
    try:
        yield launches
    finally:
        _recorded.pop()


def use(target: str) -> None:
    """Run Triton's kernels here, compiled for one of the stub's NVIDIA targets."""
    nvidia = backends["nvidia"]
    if not issubclass(nvidia.compiler, _ToPtx):
        compiler = type("PtxBackend", (_ToPtx, nvidia.compiler), {})
        backends["nvidia"] = replace(nvidia, compiler=compiler)
    driver = stub_driver.StubDriver(stub_driver.TARGETS[target])
    driver.utils, driver.launcher_cls = _Utils(), _Launcher
    triton.runtime.driver.set_active(driver)


class _ToPtx:
    """Triton's backend for NVIDIA without its last stage: the binary of a kernel is its PTX."""

    def add_stages(self, stages: dict[str, Any], *arguments: Any) -> None:
        """As there, but for the assembler."""
        super().add_stages(stages, *arguments)  # type: ignore[misc]
        stages["cubin"] = lambda ptx, _: ptx.encode()

    def hash(self) -> str:
        """Triton's cache on disk must not take one for the other."""
        return f"{super().hash()}-ptx"  # type: ignore[misc]


class _Utils(stub_driver._Utils):
    def load_binary(self, _: str, ptx: bytes, *__: Any) -> tuple[Any, ...]:
        """The program in place of a function's handle."""
        if ptx not in _programs:
            _programs[ptx] = Program(parse(ptx.decode()))
        return ptx, _programs[ptx], 0, 0, 1024


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self._types = dict(source.signature)  # of each argument, by name
        self._shared = metadata.shared

    def __call__(self, x: int, y: int, z: int, _: int, program: Program, *others: Any) -> None:
        arguments = others[-len(self._types) :]  # after what Triton's hooks are told
        values, tensors = [], []
        for (name, kind), argument in zip(self._types.items(), arguments):
            if kind == "constexpr":
                continue
            values.append(_bits(kind, argument))
            if kind[0] == "*" and argument is not None:
                storage = argument.untyped_storage()
                tensors.append(Tensor(name, storage.data_ptr(), storage.nbytes()))
        # Beyond the arguments are pointers of Triton's own, which these kernels do not use.
        values += [0] * (len(program.kernel.params) - len(values))
        params = dict(zip(program.kernel.params, values))
        counts = Counts(program.kernel, x * y * z) if _recorded else None
        memory = GlobalMemory(tensors)
        Launch(program, (x, y, z), params, memory, self._shared, turns, counts).run()
        for launches in _recorded:
            launches.append((program.kernel.name, counts))


def _bits(kind: str, argument: Any) -> int:
    """As the driver's own launcher would hand it over."""
    if kind[0] == "*":
        return 0 if argument is None else argument.data_ptr()
    if kind in ("fp32", "fp64"):
        form, whole = {"fp32": ("<f", "<I"), "fp64": ("<d", "<Q")}[kind]
        return struct.unpack(whole, struct.pack(form, float(argument)))[0]
    bits, value = int(kind[1:]), int(argument)
    low = -(1 << bits - 1) if kind[0] == "i" and bits > 1 else 0
    if not low <= value < (1 << bits):
        raise OverflowError(f"{value} is no {kind}")
    return value & ((1 << bits) - 1)
