"""A compiled Triton kernel with its grid and arguments, launched again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from vaekl._noise import SEED_OFFSET, draw_key
from vaekl._spec import Source

from . import layout
from .workspace import workspaces


@lru_cache
def warp_size() -> int:
    """32 on NVIDIA, 64 on AMD's data-centre GPUs; any number under the interpreter."""
    if triton.knobs.runtime.interpret:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; there is none to ask where tensors stay on the CPU."""
    if device.type != "cuda":
        return layout.MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def grid_of(
    view: layout.View, config: layout.Config, device: torch.device, sums: layout.Sums
) -> layout.Grid:
    """Programs for a view of tensors."""
    of_device = _multiprocessors(device)
    return layout.grid(view.rows, view.width, config, of_device, view.channels, sums)


def usual_config(dtype: torch.dtype) -> layout.Config:
    """Of a computation in this dtype: float64's registers leave no room for many warps."""
    usual = layout.current_config()
    if dtype == torch.float64:
        usual = replace(usual, widest=usual.tile)
    return usual


def new_key(device: torch.device, source: Source) -> tuple[int, int, Tensor | None, Tensor]:
    """(seed, offset, a key on the device if it is there) to draw from, and where it is kept."""
    if source.seed is None:
        seed, offset, on_device = draw_key(device, source)
    else:  # as there, in a third of the time
        seed, offset, on_device = source.seed, SEED_OFFSET, None
    key = torch.empty_strided((2,), (1,), dtype=torch.int64, device=device)
    return seed, offset, on_device, key


class Launch:
    """A kernel with all but its tensors and its key fixed."""

    def __init__(self, kernel: Any, grid: layout.Grid, columns: int, fixed: Sequence[Any]) -> None:
        self.kernel = kernel
        self.grid = (columns, grid.ranges, 1)
        self.fixed = (*fixed, grid.block_rows, grid.block_cols)
        # FMA contraction is part of the error budget; Triton's default for it changes in 3.10.
        warps = max(1, grid.threads // warp_size())
        self.options = {"num_warps": warps, "enable_fp_fusion": True}
        self.compiled: Any = None

    def __call__(
        self, tensors: Sequence[Tensor | None], anywhere: Sequence[int], *key: int
    ) -> None:
        """Launch on the current stream; `key` is what follows the tensors.

        The tensors `anywhere` are the caller's, or have been through its hooks, and may lie at any
        address; the others are allocated for the call. For pointers that are not 16-byte aligned
        Triton compiles another kernel; those take its ordinary launch, which finds it. Nothing else
        that a kernel is compiled for is left open by a plan.
        """
        address = 0
        for i in anywhere:
            tensor = tensors[i]
            if tensor is not None:
                address |= tensor.data_ptr()
        try:
            if self.compiled is not None and address % 16 == 0:
                self.compiled(*tensors, *key, *self.fixed)
            else:
                compiled = self.kernel[self.grid](*tensors, *key, *self.fixed, **self.options)
                if compiled is not None and address % 16 == 0:  # the interpreter compiles nothing
                    self.compiled = compiled[self.grid]
        except BaseException:
            workspaces.forget()
            raise


def is_elsewhere(tensor: Tensor) -> bool:
    """On a CUDA device that is not the current one: nothing may be launched there as it stands."""
    return tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()
