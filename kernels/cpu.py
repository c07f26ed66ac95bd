"""CPU kernels: the twins of ``forward``, ``backward`` and ``statistics``, compiled by numba.

The batch is cut into pieces: column tiles (at most BLOCK wide) x row ranges. Workers (threads that
call the same kernel with the same arguments) take the next chunk of pieces until none is left, and
walk down the rows of each a block at a time. A block is some rows, so that it is as full for 2
columns as for 500.

Each piece writes its own float64 sums. Who finishes the last range of a tile adds up its columns,
and who finishes the last piece of all adds up the rest, both in a fixed order: results do not
depend on how many workers there are or which did what.
"""

from contextlib import suppress
from pathlib import Path

from .cpu_backward import backward
from .cpu_blocks import ALL, BATCH, BLOCK, BUFFERS, NONE
from .cpu_forward import forward
from .cpu_memory import BF16, F16, F32, F64
from .cpu_statistics import STATISTICS_BUFFERS, SUMS, statistics

__all__ = [
    "ALL",
    "BATCH",
    "BF16",
    "BLOCK",
    "BUFFERS",
    "F16",
    "F32",
    "F64",
    "NONE",
    "STATISTICS_BUFFERS",
    "SUMS",
    "backward",
    "forward",
    "statistics",
]

# numba takes a change of a kernel's own file alone for a change of its code; all these go into it.
_SOURCES = [
    *sorted(Path(__file__).parent.glob("cpu*.py")),
    Path(__file__).with_name("coefficients.py"),
]
_STAMPS = tuple((status.st_mtime, status.st_size) for status in (p.stat() for p in _SOURCES))
for _kernel in (forward, backward, statistics):
    with suppress(RuntimeError):  # no folder that can be written to: compiled in each process
        _kernel.enable_caching()
        _kernel._cache._cache_file._source_stamp = _STAMPS
