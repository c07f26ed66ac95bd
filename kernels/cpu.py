"""CPU kernels: the twins of ``forward``, ``backward`` and ``statistics``, compiled by numba.

The batch is cut into pieces: column tiles (at most BLOCK wide) x row ranges. Workers (the threads
of a team) take the next chunk of pieces until none is left, and walk down the rows of each a block
at a time. A block is some rows, so that it is as full for 2 columns as for 500.

Each piece writes its own float64 sums. Who finishes the last range of a tile adds up its columns;
once all is done the calling thread adds up the rest. The order is fixed: results do not depend on
how many workers there are or which did what.
"""

from .cpu_backward import backward
from .cpu_blocks import ALL, BATCH, BLOCK, BUFFERS, NONE, TILES, WORKERS
from .cpu_cache import keep_on_disk
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
    "TILES",
    "WORKERS",
    "backward",
    "forward",
    "statistics",
]

for _kernel in (forward, backward, statistics):
    keep_on_disk(_kernel)
