"""The threads of the cpu backend: those that torch's own operators run on.

They spin for a while after each operator, on all cores: threads of any other kind would have to
wait for one. Kernels release the GIL, and these threads never need it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch

from vaekl._registry import kept


def _openmp() -> int:
    """The address of GOMP_parallel in the OpenMP runtime that torch is linked with; 0: none."""
    try:
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):  # another kind of runtime, or a torch without one
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_PARALLEL = _openmp()
#: Any other process has been forked from it.
_HOME: int = kept.setdefault("process", os.getpid())
_leader: tuple[int, ThreadPoolExecutor] | None = None


def _lead() -> ThreadPoolExecutor | None:
    """In a forked child, a thread to start teams from.

    fork copies only the calling thread; if that one belonged to an OpenMP team, it would wait for
    the others for ever. So teams are started from a new thread.
    """
    global _leader
    process = os.getpid()
    if process == _HOME:
        return None
    if _leader is None or _leader[0] != process:
        _leader = process, ThreadPoolExecutor(1, thread_name_prefix="vaekl")
    return _leader[1]


def run(kernel: Callable[..., None], threads: int, *arguments: Any) -> None:
    """A kernel on so many threads, or on the calling one where there is no OpenMP."""
    leader = _lead() if threads > 1 else None
    if leader is not None:
        future = leader.submit(kernel, _PARALLEL, threads, *arguments)
        try:
            future.result()
        finally:
            wait([future])  # an interrupted caller frees what the kernel writes to
    else:
        kernel(_PARALLEL if threads > 1 else 0, threads, *arguments)
