"""Checks of user input: every error names the argument and what was seen, before any work."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._options import DTYPES, compute_dtype

REDUCTIONS = ("none", "sum", "batchmean", "mean")
MEANS_OVER = ("batch", "all")
BACKENDS = ("auto", "triton", "cpu", "eager")


def _tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {names}; got {value.dtype}")
    if value.layout is not torch.strided or value.is_nested:
        found = "a nested one" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {found}")
    # It lacks some of the operations, and torch.where of one ends in a RecursionError.
    if type(value) is not Tensor and isinstance(value, torch.masked.MaskedTensor):
        raise TypeError(
            f"{name} must be a tensor without a mask, got MaskedTensor (give its get_data(), and "
            "mask the KLs of reduction='none')"
        )


def _alike(name: str, value: Tensor, mu: Tensor) -> None:
    if value.shape != mu.shape:
        expands = value.dim() == mu.dim() and all(
            n in (1, m) for n, m in zip(value.shape, mu.shape)
        )
        raise ValueError(
            f"{name} must have the shape of mu, {tuple(mu.shape)}; got {tuple(value.shape)}"
            + (" (expand it first: .expand_as(mu) costs no memory)" if expands else "")
        )
    if value.device != mu.device:
        raise ValueError(f"{name} must be on the device of mu, {mu.device}; got {value.device}")


def choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """A string out of a few."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def flag(name: str, value: Any) -> None:
    """A bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def parameters(mu: Any, logvar: Any, batch_dims: Any) -> None:
    """mu and logvar fit each other, and batch_dims fits them."""
    _tensor("mu", mu)
    _tensor("logvar", logvar)
    _alike("logvar", logvar, mu)
    integer("batch_dims", batch_dims, 0, mu.dim(), mu)


def moments(value: Any, dim: Any, batch_dims: Any, name: str = "moments") -> int:
    """It has two halves along dim, and batch_dims fits it; dim counted from the front."""
    _tensor(name, value)
    shape, rank = tuple(value.shape), value.dim()
    if rank == 0:
        raise ValueError(f"{name} must have an axis that holds mu and logvar; got shape ()")
    for which, number, low, high in (
        ("dim", dim, -rank, rank - 1),
        ("batch_dims", batch_dims, 0, rank),
    ):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{which} must be an int, got {type(number).__name__}")
        if not low <= number <= high:
            raise ValueError(
                f"{which} must be in [{low}, {high}] ({name} has shape {shape}); got {number}"
            )
    if shape[dim] % 2:
        raise ValueError(
            f"{name} must have an even size along dim={dim}, mu and logvar half each; got "
            f"{shape[dim]} (shape {shape})"
        )
    axis: int = dim % rank
    return axis


def integer(name: str, value: Any, low: int, high: int, of: Tensor | None = None) -> None:
    """An int, no bool, within [low, high]; `of` is the mu whose shape sets the bounds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        why = "" if of is None else f" (mu has shape {tuple(of.shape)})"
        raise ValueError(f"{name} must be in [{low}, {high}]{why}; got {value}")


def noise(mu: Tensor, eps: Any, generator: Any, seed: Any) -> None:
    """At most one source of noise, and one that fits mu."""
    if (eps is not None) + (generator is not None) + (seed is not None) > 1:
        given = {"eps": eps, "generator": generator, "seed": seed}
        names = [name for name, value in given.items() if value is not None]
        raise ValueError(f"give at most one of eps, generator and seed; got {' and '.join(names)}")
    if eps is not None:
        _tensor("eps", eps)
        _alike("eps", eps, mu)
    if seed is not None:
        integer("seed", seed, -(2**63), 2**64 - 1)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        places = (generator.device, mu.device)
        if places[0].type != places[1].type or (
            None not in (places[0].index, places[1].index) and places[0] != places[1]
        ):
            raise ValueError(
                f"generator must be on the device of mu, {mu.device}; got {generator.device}"
            )


def clamp_bounds(
    clamp: Any, inputs: tuple[Tensor, Tensor, Tensor | None] | None = None
) -> tuple[float, float] | None:
    """(lo, hi) as floats; infinite where None, or beyond the range of the dtype computed in.

    None where both are: nothing is clamped.

    `inputs`: mu, logvar and eps, which say the dtype; float64 without them.
    """
    if clamp is None:
        return None
    if not isinstance(clamp, Sequence) or isinstance(clamp, str) or len(clamp) != 2:
        raise TypeError(f"clamp must be a pair (lo, hi) or None, got {clamp!r}")
    for value in clamp:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TypeError(f"clamp bounds must be numbers or None, got {clamp!r}")
    lo = -math.inf if clamp[0] is None else clamp[0]
    hi = math.inf if clamp[1] is None else clamp[1]
    if not lo <= hi:
        raise ValueError(f"clamp needs lo <= hi, got {clamp!r}")
    largest = torch.finfo(torch.float64 if inputs is None else compute_dtype(*inputs)).max
    bounds = _within(lo, largest), _within(hi, largest)
    return None if bounds == (-math.inf, math.inf) else bounds


def _within(bound: float, largest: float) -> float:
    """A float, infinite past the largest; an int may be too long for a float of its own."""
    if -largest <= bound <= largest:
        return float(bound)
    return math.inf if bound > 0 else -math.inf


# Found out once and for all; torch.compile, which traces what reads it, warns of a cached function.
_INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("triton", "numba")}
if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":  # it would not compile anything
    _INSTALLED["numba"] = False


def has_triton() -> bool:
    """Is triton installed (not imported here)?"""
    return _INSTALLED["triton"]


def has_numba() -> bool:
    """Is there a numba that compiles (not imported here)?"""
    return _INSTALLED["numba"]


def resolve_backend(backend: Any, device: torch.device) -> str:
    """The backend that runs: "triton", "cpu" or "eager".

    Raises:
        ValueError: an unknown name, or a backend asked for on a device that it cannot use.
        ModuleNotFoundError: what the backend asked for needs is not installed.
    """
    if backend == "auto":
        kind = device.type
        if kind == "cuda" and has_triton():
            return "triton"
        return "cpu" if kind == "cpu" and has_numba() else "eager"
    choice("backend", backend, BACKENDS)
    if backend == "cpu":
        if not has_numba():
            raise ModuleNotFoundError(
                "backend='cpu' needs numba: pip install 'vaekl[cpu]' (NUMBA_DISABLE_JIT not set)"
            )
        if device.type not in ("cpu", "meta"):
            raise ValueError(f"backend='cpu' needs tensors on the CPU, got {device}")
    if backend == "triton":
        if not has_triton():
            raise ModuleNotFoundError("backend='triton' needs triton: pip install 'triton>=3.6'")
        if device.type not in ("cuda", "meta") and not _interpreting():
            raise ValueError(
                f"backend='triton' needs tensors on a CUDA or ROCm device, got {device} (set "
                "TRITON_INTERPRET=1 before importing triton to run the kernels on the CPU, slowly)"
            )
    return str(backend)


def _interpreting() -> bool:
    """Do Triton's kernels run under its interpreter?"""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
