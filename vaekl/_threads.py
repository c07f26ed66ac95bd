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


def _openmp() -> int:
    """The address of GOMP_parallel in the OpenMP runtime that torch is linked with; 0: none."""
    try:
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):  # another kind of runtime, or a torch without one
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_PARALLEL = _openmp()
#: In a forked child only: a thread to start teams from. The one that lived on may have been of a
#: team whose other threads did not, and would wait for them for ever.
_leader: ThreadPoolExecutor | None = None


def _after_fork() -> None:
    global _leader
    _leader = ThreadPoolExecutor(1, thread_name_prefix="vaekl")


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)


def run(kernel: Callable[..., None], threads: int, *arguments: Any) -> None:
    """A kernel on so many threads, or on the calling one where there is no OpenMP."""
    if threads > 1 and _leader is not None:
        future = _leader.submit(kernel, _PARALLEL, threads, *arguments)
        try:
            future.result()
        finally:
            wait([future])  # an interrupted caller frees what the kernel writes to
    else:
        kernel(_PARALLEL if threads > 1 else 0, threads, *arguments)
