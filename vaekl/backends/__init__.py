"""Which backends there are, which can run in this process, and why another cannot.

A library that is installed may still not import (numba beside a NumPy that is too new for it),
compile nothing (its JIT is off) or not start (Triton without a C compiler). It shows on first use,
and then holds for the process. ``torch.compile`` takes the answers as constants.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from .protocol import Backend, UnavailableError, told


class Entry(NamedTuple):
    """What is known of a backend before it is imported."""

    load: Callable[[], Backend]
    devices: tuple[str, ...] = ()  # types of device whose tensors it takes; none named: all
    place: str = ""  # those, in words, and {} for what else was given
    library: str | None = None  # that it needs
    install: str = ""
    is_sized: bool = True  # a plan for contiguous tensors depends on their sizes
    keeps_noise: bool = False  # ``Saved.noise`` is what backward needs, not ``Saved.key``


# By statements in functions: what freezes an application packs the modules that it sees in these.


def _triton() -> Backend:
    from . import triton

    return triton


def _cpu() -> Backend:
    from . import cpu

    return cpu


def _eager() -> Backend:
    from . import eager

    return eager


registry: dict[str, Entry] = {
    "triton": Entry(
        _triton,
        ("cuda",),
        "a CUDA or ROCm device, got {} (set TRITON_INTERPRET=1 before importing triton to run the "
        "kernels on the CPU, slowly)",
        "triton",
        "pip install 'triton>=3.6'",
    ),
    "cpu": Entry(
        _cpu, ("cpu",), "the CPU, got {}", "numba", "pip install 'vaekl[cpu]'", is_sized=False
    ),
    "eager": Entry(_eager, is_sized=False, keeps_noise=True),
}
FALLBACK = "eager"
_FASTEST = {"cuda": "triton", "cpu": "cpu"}
_loaded: dict[str, Backend] = {}
_found: dict[tuple[str, str], str | None] = {}
#: What "auto" is on a device, as far as that is known.
chosen: dict[torch.device, str] = {}


def get(name: str) -> Backend:
    """The backend, imported on first use.

    Raises:
        ModuleNotFoundError: What it needs does not work. A compiled program may come from a machine
            where it does.
    """
    backend = _loaded.get(name)
    if backend is None:
        require(name)
        backend = _loaded[name] = registry[name].load()
    return backend


def names() -> tuple[str, ...]:
    """Of all backends."""
    return tuple(registry)


def keeps_noise(name: str) -> bool:
    """Is ``Saved.noise`` what backward needs, not ``Saved.key``?"""
    return registry[name].keeps_noise


def problem(name: str, device: str) -> str | None:
    """What is wrong with a backend for this type of device: its name, that it cannot run
    (``require`` says why), or which tensors it takes.
    """
    entry = registry.get(name)
    if entry is None or why_not(name, device) is not None:
        return ""
    takes_it = not entry.devices or device in entry.devices or device == "meta"
    return None if takes_it else entry.place


def forget() -> None:
    """Find everything out anew."""
    _loaded.clear()
    _found.clear()
    chosen.clear()


def why_not(name: str, device: str) -> str | None:
    """What keeps a backend from running on a type of device, as "needs ..."; None: nothing."""
    key = name, device
    if key in _found:
        return _found[key]
    reason = None if name == FALLBACK else _import(name)
    if reason is None:
        if device == "cuda" and not torch.cuda.is_initialized():
            return None  # tensors without a device, such as fake ones: nothing is to be launched
        reason = registry[name].load().why_not(device)
    _found[key] = reason
    return reason


def require(name: str, device: str = "cpu") -> None:
    """Raise ModuleNotFoundError if a backend cannot run on a type of device, and say why."""
    reason = why_not(name, device)
    if reason is not None:
        raise ModuleNotFoundError(f"backend={name!r} {reason}")


def automatic(device: torch.device) -> str:
    """What backend="auto" is on a device.

    The eager backend in place of one that is installed and cannot run, with a warning.
    """
    if device in chosen:
        return chosen[device]
    kind: str = device.type
    name = _FASTEST.get(kind, FALLBACK)
    reason = why_not(name, kind)
    if reason is None and (name, kind) not in _found:
        return name
    chosen[device] = name if reason is None else FALLBACK
    if reason not in (None, _absent(name)):
        warnings.warn(
            f"vaekl: the slower backend {FALLBACK!r} runs on {kind} tensors, because "
            f"backend={name!r} {reason}",
            RuntimeWarning,
            stacklevel=5,  # the caller of a public function, in most cases
        )
    return chosen[device]


# As torch.compiler.assume_constant_result does, which imports Dynamo.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]
automatic._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _absent(name: str) -> str:
    entry = registry[name]
    return f"needs {entry.library}: {entry.install}"


def _import(name: str) -> str | None:
    """Import the library and the backend; what is wrong with them."""
    entry = registry[name]
    try:
        if entry.library is not None:
            if importlib.util.find_spec(entry.library) is None:
                return _absent(name)
            importlib.import_module(entry.library)
        entry.load()
    except UnavailableError as error:
        return str(error)
    except Exception as error:  # whatever a broken installation raises
        return f"needs {entry.library or name}, and importing it raises {told(error)}"
    return None
