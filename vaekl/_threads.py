"""The threads of the cpu backend.

They are Python's, not numba's: its own pools do not survive a fork or two callers at once. Kernels
release the GIL.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _forget_pool() -> None:
    """A forked child has none of its parent's threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_forget_pool)


def helpers(count: int) -> ThreadPoolExecutor:
    """A pool of `count` threads or more.

    A smaller one goes when nobody holds it any more; shut down at once, it would refuse what
    another caller is about to give it.
    """
    global _pool, _pool_size
    pool = _pool
    if pool is None or _pool_size < count:
        pool = ThreadPoolExecutor(count, thread_name_prefix="vaekl")
        _pool, _pool_size = pool, count
    return pool


def share(work: Callable[[], bool], count: int, keep: Any) -> None:
    """Do work on `count` threads: the calling one always works, others join it when they wake.

    work takes parts of a common job until none is left, and says whether all of it is done.
    `keep` holds the memory for as long as any thread may look at it.
    """
    futures: list[Future[Any]] = []
    if count > 1:
        pool = helpers(count - 1)
        with suppress(RuntimeError):  # no thread to be had: a limit, or the interpreter is ending
            for _ in range(count - 1):
                futures.append(pool.submit(_help, work, keep))
    done = work()
    for future in futures:
        # One that has not begun by now would find nothing left to do.
        if not future.cancel() and not done:
            future.result()
    # A submission that was refused may be queued all the same, and a thread have a part of the job.
    while not done:
        done = work()


def _help(work: Callable[[], bool], keep: Any) -> None:
    work()
