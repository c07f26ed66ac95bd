"""Which backend can run in this process, and why another cannot.

A library that is installed may still not import (numba beside a NumPy that is too new for it),
compile nothing (its JIT is off) or not start (Triton without a C compiler). It shows on first use,
and then holds for the process. ``torch.compile`` takes the answers as constants.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings

import torch

_LIBRARIES = {"triton": "triton", "cpu": "numba"}
_KERNELS = {
    "triton": ("vaekl.kernels.forward", "vaekl.kernels.backward", "vaekl.kernels.statistics"),
    "cpu": ("vaekl.kernels.cpu",),
}
_ABSENT = {
    "triton": "needs triton: pip install 'triton>=3.6'",
    "cpu": "needs numba: pip install 'vaekl[cpu]'",
}
_FASTEST = {"cuda": "triton", "cpu": "cpu"}
_found: dict[tuple[str, str], str | None] = {}
_automatic: dict[str, str] = {}


def forget() -> None:
    """Find everything out anew."""
    _found.clear()
    _automatic.clear()


def why_not(backend: str, device: str) -> str | None:
    """What keeps a backend from running on a type of device, as "needs ..."; None: nothing."""
    key = backend, device
    if key in _found:
        return _found[key]
    reason = None if backend == "eager" else _import(backend)
    if reason is None and backend == "triton" and device == "cuda":
        if not torch.cuda.is_initialized():
            return None  # tensors without a device, such as fake ones: nothing is to be launched
        reason = _start_triton()
    _found[key] = reason
    return reason


def require(backend: str, device: str = "cpu") -> None:
    """Raise ModuleNotFoundError if a backend cannot run on a type of device, and say why."""
    reason = why_not(backend, device)
    if reason is not None:
        raise ModuleNotFoundError(f"backend={backend!r} {reason}")


def automatic(device: str) -> str:
    """What backend="auto" is on a type of device.

    The eager backend in place of one that is installed and cannot run, with a warning.
    """
    if device in _automatic:
        return _automatic[device]
    backend = _FASTEST.get(device, "eager")
    reason = why_not(backend, device)
    if reason is None and (backend, device) not in _found:
        return backend
    _automatic[device] = backend if reason is None else "eager"
    if reason not in (None, _ABSENT.get(backend)):
        warnings.warn(
            f"vaekl: the slower backend 'eager' runs on {device} tensors, because "
            f"backend={backend!r} {reason}",
            RuntimeWarning,
            stacklevel=5,  # the caller of a public function, in most cases
        )
    return _automatic[device]


# As torch.compiler.assume_constant_result does, which imports Dynamo.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]
automatic._dynamo_marked_constant = True  # type: ignore[attr-defined]


def interpreting() -> bool:
    """Do Triton's kernels run under its interpreter?"""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _import(backend: str) -> str | None:
    """Import the library and the kernels; what is wrong with them."""
    library = _LIBRARIES[backend]
    try:
        if importlib.util.find_spec(library) is None:
            return _ABSENT[backend]
        module = importlib.import_module(library)
        if backend == "cpu" and module.config.DISABLE_JIT:
            return (
                "needs numba's JIT, which is off (NUMBA_DISABLE_JIT, numba.config.DISABLE_JIT or "
                ".numba_config.yaml)"
            )
        for name in _KERNELS[backend]:
            importlib.import_module(name)
    except Exception as error:  # whatever a broken installation raises
        return f"needs {library}, and importing it raises {_told(error)}"
    return None


def _start_triton() -> str | None:
    """Load Triton's driver, for which it compiles C; what is wrong with it."""
    import triton

    if interpreting():
        return None
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"needs triton with a driver and a C compiler, and its start raises {_told(error)}"
    return None


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
