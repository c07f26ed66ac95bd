"""Memory that launches share: arrival counters, zero between launches, and scratch.

One of each per (device, stream): launches on a stream follow each other. A captured graph may
replay on any stream, so its launches get their own from the graph's memory; the zeros are a node
of the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST = 4096


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
            stream = torch.cuda.current_stream(device).cuda_stream
        scratch = self.scratch.get((device, stream, dtype))
        if scratch is None or scratch.numel() < size:
            scratch = torch.empty(max(size, _SMALLEST), dtype=dtype, device=device)
            self.scratch[device, stream, dtype] = scratch
        counters = self.counters.get((device, stream))
        if counters is None or counters.numel() < count:
            counters = torch.zeros(max(count, _SMALLEST), dtype=torch.int32, device=device)
            self.counters[device, stream] = counters
        return scratch, counters

    def forget(self) -> None:
        """After a launch that failed half way its counts are not to be trusted."""
        self.counters.clear()


workspaces = Workspaces()
