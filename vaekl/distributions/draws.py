"""Samples of packed parameters, for one generator or for one per sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vaekl import _roads, _validate, functional
from vaekl._noise import draw_key
from vaekl._spec import Source, Terms
from vaekl.backends import keeps_noise

from .attributes import CLAMP

Generators = torch.Generator | Sequence[torch.Generator] | None


def given(result: Tensor | None) -> Tensor:
    """A result that was asked for."""
    if result is None:
        raise RuntimeError("a result that was asked for is missing")
    return result


def drawn(
    parameters: Tensor, generator: Generators, reduction: str | None
) -> tuple[Tensor, Tensor | None]:
    """A sample, and its KLs if asked for, from a generator or one per sample."""
    if not isinstance(generator, Sequence):
        return _of_one(parameters, generator, reduction)
    if len(generator) == 1:
        return _of_one(parameters, generator[0], reduction)
    count = parameters.shape[0]
    if len(generator) != count or count == 0:
        raise ValueError(
            f"generator must be one torch.Generator or a list of one per sample, {count}; "
            f"got a list of {len(generator)}"
        )
    keys = _keys(parameters, generator)
    if keys is not None:
        return _of_source(parameters, Source(None, None, keys, "keys"), reduction)
    results = [_of_one(p, g, reduction) for p, g in zip(parameters.split(1), generator)]
    kls = [kl for _, kl in results if kl is not None]
    return torch.cat([z for z, _ in results]), torch.cat(kls) if kls else None


def _of_one(
    parameters: Tensor, generator: torch.Generator | None, reduction: str | None
) -> tuple[Tensor, Tensor | None]:
    """A sample, and its KLs if asked for; one launch."""
    eps = seed = None
    device = parameters.device
    if isinstance(generator, torch.Generator) and generator.device.type == "cpu" != device.type:
        if device.type == "cuda":  # the key that the generator would give for tensors of the CPU
            seed, generator = draw_key(generator.device, Source(generator)).seed, None
        else:
            shape = parameters.chunk(2, dim=1)[0].shape
            eps, generator = torch.randn(shape, generator=generator, dtype=parameters.dtype), None
            eps = eps.to(device)
    return _of_source(parameters, Source(generator, seed), reduction, eps)


def _of_source(
    parameters: Tensor, source: Source, reduction: str | None, eps: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    packed, terms = functional.Packed(parameters, 1, eps), Terms(True, reduction)
    z, kl, _ = functional.compute_moments(packed, source, terms, None, "logvar", CLAMP, "auto")
    return given(z), kl


def _keys(parameters: Tensor, generators: Sequence[torch.Generator]) -> Tensor | None:
    """What each sample alone would draw from its generator, int64[B, 2], for one launch that reads
    them; None where there is no such launch, or an error to be told.
    """
    device = parameters.device
    if not all(isinstance(generator, torch.Generator) for generator in generators):
        return None
    places = {generator.device for generator in generators}
    if len(places) > 1 or not places <= {device, torch.device("cpu")}:
        return None
    if not _roads.is_direct(parameters) or device.type not in ("cpu", "cuda"):
        return None
    if keeps_noise(_validate.resolve_backend("auto", device)):  # it draws by torch.randn
        return None
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    keys = [draw_key(generator.device, Source(generator))[:2] for generator in generators]
    tensor = torch.tensor(keys, dtype=torch.int64, device="cpu")
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # the host does not wait
