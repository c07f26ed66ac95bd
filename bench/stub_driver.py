"""A Triton driver without a device: kernels compile for its target, launches do nothing.

For reading machine code on any machine (codegen.py) and for timing the host path (host.py).
Import it before anything launches, and without TRITON_INTERPRET.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _Utils:
    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spills, threads at most) of nothing."""
        return 0, 0, 0, 0, 1024

    def unload_module(self, _: int) -> None:
        """What a kernel's end asks for, from Triton 3.8 on."""

    def get_device_properties(self, _: int) -> dict[str, int]:
        """Enough shared memory for anything."""
        return {"max_shared_mem": 1 << 20, "multiprocessor_count": 132, "warpSize": 32}


class _Launcher:
    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> None:
        pass


class StubDriver(DriverBase):
    """Says that one device of `target` is there, and throws launches away."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.utils = _Utils()
        self.launcher_cls = _Launcher
        self.get_current_device = lambda: 0
        self.set_current_device = lambda _: None
        self.get_current_stream = lambda _=0: 0

    @staticmethod
    def is_active() -> bool:
        """Only when asked for by name."""
        return False

    def get_current_target(self) -> GPUTarget:
        """What kernels are compiled for."""
        return self.target

    def get_active_torch_device(self) -> torch.device:
        """Tensors stay on the CPU."""
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        """No launcher is compiled, so any name will do."""
        return kind

    def get_benchmarker(self) -> Any:
        """Nothing runs here."""
        raise RuntimeError("a stub driver times nothing")


def use(target: str) -> None:
    """Make the stub for one of TARGETS Triton's driver in this process."""
    triton.runtime.driver.set_active(StubDriver(TARGETS[target]))
