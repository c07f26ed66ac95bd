"""What results depend on beside the code: the machine and the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from . import __version__

PACKAGES = ("vaekl", "torch", "triton", "numba", "numpy")


def cpu_name() -> str:
    """The model of the processor."""
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """The installed version of a package, None if it is not installed.

    Without metadata, as in a frozen application, what the package says of itself once imported.
    """
    if package == "vaekl":
        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", None)


def versions() -> dict[str, str | None]:
    """Of Python, and of what vaekl runs on."""
    found = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    # The build, too: torch 2.13.0+cpu.
    return {**found, "torch": str(torch.__version__)}


def devices() -> list[dict[str, Any]]:
    """The processor, then every CUDA or ROCm device."""
    threads = torch.get_num_threads()
    found: list[dict[str, Any]] = [
        {"device": "cpu", "name": cpu_name(), "cpus": os.cpu_count(), "threads": threads}
    ]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(i)
        runtime = (
            f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        )
        memory = round(facts.total_memory / 2**30, 1)
        found.append(
            {"device": f"cuda:{i}", "name": facts.name, "memory_gib": memory, "runtime": runtime}
        )
    return found
