"""A compiled Triton kernel with its grid and arguments, launched again and again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from . import layout
from .workspace import workspaces


@lru_cache
def warp_size() -> int:
    """32 on NVIDIA, 64 on AMD's data-centre GPUs; any number under the interpreter."""
    if triton.knobs.runtime.interpret:
        return 32
    return int(triton.runtime.driver.active.get_current_target().warp_size)


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
