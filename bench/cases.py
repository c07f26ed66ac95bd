"""What is measured: shapes that people train with, and a growth curve at a fixed event size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Tensors of mu's size that have to be moved, read and written together.
FLOOR = {
    "forward": 3,  # reads mu, logvar; writes z
    "backward": 5,  # reads mu, logvar, dz; writes dmu, dlogvar
    "forward+backward": 8,
}
#: What is timed. Backward alone is not: no training step runs it alone.
MODES = ("forward", "forward+backward")
#: D of the growth curve.
GROWTH_EVENT = 512


@dataclass(frozen=True)
class Case:
    """One shape [batch, *event] and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    use: str = ""  # who has this shape
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = False
    both: tuple[bool, ...] = (True, False)  # KLs: kl and kl_of_mean, or kl alone

    @property
    def name(self) -> str:
        """As shown in tables: ``128x20 fp32``."""
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{'x'.join(map(str, self.shape))} {dtype}"

    @property
    def elements(self) -> int:
        """N."""
        return math.prod(self.shape)

    @property
    def growth(self) -> bool:
        """Whether it is a point of the growth curve."""
        return self.shape[1:] == (GROWTH_EVENT,) and self.dtype == torch.float32

    def floor_bytes(self, mode: str) -> int:
        """Bytes that any implementation has to move."""
        return FLOOR[mode] * self.elements * self.dtype.itemsize

    def inputs(self, device: str, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """mu and logvar with means well off 0, so that a wrong KL of the mean shows."""
        shape = (batch or self.shape[0], *self.shape[1:])
        generator = torch.Generator(device).manual_seed(0)
        mu, logvar = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
        return (0.5 + mu).to(self.dtype), (0.5 * logvar - 1).to(self.dtype)


_BF16 = torch.bfloat16
_GPU = ("cuda",)


def _growth(batch: int, **options: object) -> Case:
    return Case((batch, GROWTH_EVENT), use="growth curve", both=(True,), **options)  # type: ignore[arg-type]


#: Most important first: what a time limit cuts off is at the end.
CASES = (
    Case((128, 20), use="MNIST examples", quick=True),
    Case((65536, 512), use="as fast as memory", devices=_GPU),
    Case((65536, 512), _BF16, use="as fast as memory", devices=_GPU),
    Case((4096, 512), use="large batch of wide codes"),
    Case((4, 4, 128, 128), use="SDXL", quick=True),
    Case((1, 16, 33, 90, 160), _BF16, use="HunyuanVideo"),
    Case((1024, 32), use="tabular, single-cell"),
    Case((16, 4, 64, 64), use="Stable Diffusion"),
    _growth(20, quick=True),
    _growth(64),
    _growth(256),
    _growth(1024),
    _growth(16384, devices=_GPU),
    _growth(262144, devices=_GPU),
    Case((262144, 512), _BF16, use="as fast as memory", devices=_GPU, both=(True,)),
    Case((16, 4, 64, 64), _BF16, use="Stable Diffusion", devices=_GPU),
    Case((12, 4, 32, 32), use="Stable Diffusion at 256"),
    Case((128, 2), use="two-dimensional codes"),
    Case((64, 10), use="small examples"),
)


def select(device: str, quick: bool = False) -> list[Case]:
    """The cases of a device ("cpu" or "cuda"), most important first."""
    return [case for case in CASES if device in case.devices and (case.quick or not quick)]
