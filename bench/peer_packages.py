"""The packages that vaekl is compared with, and what a comparison is made of."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

os.environ.setdefault("KERAS_BACKEND", "torch")

Leaves = tuple[Tensor, ...]
Outputs = tuple[Tensor, ...]
#: Distributions by what is imported.
PACKAGES = {
    "diffusers": "diffusers",
    "pythae": "pythae",
    "keras": "keras",
    "scvi": "scvi-tools",
    "lerobot": "lerobot",
    "multivae": "multivae",
    "torchrl": "torchrl",
    "torch_geometric": "torch-geometric",
    "stable_audio_tools": "stable-audio-tools",
    "pyro": "pyro-ppl",
}
#: What is imported of some; of multivae one file, since all of it needs torchvision.
PARTS = {
    "multivae": None,
    "torchrl": "torchrl.objectives",
    "torch_geometric": "torch_geometric.nn",
    "stable_audio_tools": "stable_audio_tools.models.bottleneck",
}


@dataclass(frozen=True)
class Case:
    """One function of a package."""

    package: str  # that is imported
    what: str
    shapes: tuple[tuple[int, ...], ...]  # of the leaves
    theirs: Callable[[Leaves], Outputs]
    ours: Callable[[Leaves, Tensor | None], Outputs]
    noise: tuple[int, ...]  # the shape of eps

    @property
    def name(self) -> str:
        """Of both, for tables and test ids."""
        return f"{PACKAGES[self.package]} {self.what}"

    def leaves(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Leaves:
        """Random, of values that encoders give."""
        generator = torch.Generator(device).manual_seed(seed)
        return tuple(
            (0.7 * torch.randn(shape, generator=generator, device=device))
            .to(dtype)
            .requires_grad_()
            for shape in self.shapes
        )


def missing(package: str) -> str | None:
    """Why a package cannot be compared with; None if it can."""
    if importlib.util.find_spec(package) is None:
        return "not installed"
    part = PARTS.get(package, package)
    try:
        if part is not None:
            importlib.import_module(part)
    except Exception as error:  # whatever its import runs into
        return f"cannot be imported ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None


def version(package: str) -> str:
    """Of what is installed."""
    return importlib.metadata.version(PACKAGES[package])


#: Where the packages get normal noise from.
SOURCES = (
    (torch, "randn_like"),
    (torch, "randn"),
    (torch.distributions.normal, "_standard_normal"),
)


@contextmanager
def fixed_noise(eps: Tensor) -> Iterator[None]:
    """Every package's source of normal noise gives eps, in the dtype it asks for."""

    def give(*arguments: Any, **options: Any) -> Tensor:
        first = arguments[0] if arguments else None
        dtype = options.get("dtype") or (first.dtype if isinstance(first, Tensor) else None)
        return eps.to(dtype=dtype or arguments[1])

    with ExitStack() as stack:
        for place, name in SOURCES:
            stack.enter_context(mock.patch.object(place, name, give))
        yield
