"""Memory that launches share: arrival counters, zero between launches, and scratch.

One of each per (device, stream): launches on a stream follow each other. A stream is its handle,
as it is to torch's own allocator: whoever destroys a stream waits for it first. A captured graph
may replay on any stream, so its launches get their own from the graph's memory; the zeros are a
node of the graph.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_SMALLEST = 4096


def _lasting(device: torch.device, dtype: torch.dtype, size: int, zero: bool) -> Tensor:
    """Memory to keep, from the ordinary pool whatever the caller allocates from.

    What a thread allocates may be routed to a pool that ends or is rewound: CUDA graph trees do so
    in their warm-up, where nothing is captured yet, and torch.cuda.use_mem_pool. The routing is the
    thread's own, like inference mode; another thread, on the same stream, has neither.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    made: list[Tensor] = []
    failed: list[BaseException] = []

    def make() -> None:
        try:
            if stream is not None:
                # And its device. Nothing is set back in a thread that ends here: what a context
                # manager goes back to is device 0, where that would begin a context.
                torch.cuda.set_stream(stream)
            new = torch.zeros if zero else torch.empty
            made.append(new(size, dtype=dtype, device=device))
        except BaseException as error:  # for the caller
            failed.append(error)

    # No executor: it takes no more work once the main thread has ended, and others may go on.
    thread = threading.Thread(target=make, name="vaekl workspace")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


class Workspaces:
    """The buffers, grown when a launch needs more."""

    def __init__(self) -> None:
        self.counters: dict[tuple[torch.device, int], Tensor] = {}
        self.scratch: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}

    def get(
        self, device: torch.device, dtype: torch.dtype, size: int, count: int
    ) -> tuple[Tensor, Tensor]:
        """Scratch of `size` elements of dtype, not initialised, and `count` int32 zeros."""
        stream = 0
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                own = torch.empty(size, dtype=dtype, device=device)
                return own, torch.zeros(count, dtype=torch.int32, device=device)
            stream = torch._C._cuda_getCurrentRawStream(device.index)
        scratch = self.scratch.get((device, stream, dtype))
        if scratch is None or scratch.numel() < size:
            scratch = _lasting(device, dtype, max(size, _SMALLEST), zero=False)
            self.scratch[device, stream, dtype] = scratch
        counters = self.counters.get((device, stream))
        if counters is None or counters.numel() < count:
            counters = _lasting(device, torch.int32, max(count, _SMALLEST), zero=True)
            self.counters[device, stream] = counters
        return scratch, counters

    def forget(self) -> None:
        """After a launch that failed half way its counts are not to be trusted."""
        self.counters.clear()


workspaces = Workspaces()
