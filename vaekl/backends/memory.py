"""Memory of large results on CPUs."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

#: Smallest result, in bytes, for which huge pages pay; NumPy has the same threshold.
LARGE = 4 << 20
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has it
_madvise = None if _ADVICE is None else ctypes.CDLL(None).madvise
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def empty_like(model: Tensor, dtype: torch.dtype) -> Tensor:
    """As torch.empty_like; on huge pages where it is large and the system has them."""
    return allocator(model, dtype)(model)


def allocator(model: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """empty_like for tensors that are all of the size and dtype of this one."""
    plain: Callable[[Tensor], Tensor] = torch.empty_like
    if dtype is not model.dtype:
        plain = partial(torch.empty_like, dtype=dtype)
    if model.numel() < LARGE // 8 or not model.is_cpu:  # small, whatever the dtype
        return plain

    def on_huge_pages(like: Tensor) -> Tensor:  # holds no tensor: plans are kept
        fresh = plain(like)
        _use_huge_pages(fresh)
        return fresh

    return on_huge_pages


def _use_huge_pages(tensor: Tensor) -> None:
    """Ask for 2 MiB pages behind fresh memory, where it is large.

    The first write to each page costs a fault, and for small pages all of these can take longer
    than the arithmetic.
    """
    size = tensor.untyped_storage().nbytes()
    if size >= LARGE and _madvise is not None and tensor.is_cpu:
        page = mmap.PAGESIZE
        start = -(-tensor.data_ptr() // page) * page
        end = (tensor.data_ptr() + size) // page * page
        _madvise(start, end - start, _ADVICE)  # advice: an error changes nothing
