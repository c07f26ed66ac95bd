"""Where the noise key (seed, offset) of a call comes from, and the stream in torch integers.

The stream itself is fixed by ``vaekl.kernels.philox`` (docs/noise.md). ``seed=`` is the key (seed,
SEED_OFFSET); a CUDA generator gives its own Philox seed and offset and advances by 4; a CPU
generator gives 64 bits as a seed.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _len_torch_dispatch_stack

from ._spec import Key, Source, has_float64

#: 2^63 as an int64. torch's CUDA generator counts from 0 with the same Philox: at offset 0, seed=s
#: would repeat the words of whatever it draws first after manual_seed(s).
SEED_OFFSET = -(2**63)

_WORD = 0xFFFFFFFF
_CPU = torch.device("cpu")
# Between reading an offset and moving on, no other thread may read it.
_LOCK = threading.Lock()


class _Word(threading.local):
    """Memory for one 64-bit draw, a separate one in each thread."""

    def __init__(self) -> None:
        with torch.inference_mode(False):
            self.tensor = torch.empty((), dtype=torch.int64, device="cpu")


_word = _Word()


def signed64(seed: int) -> int:
    """The int64 with the bits of `seed`, as torch.manual_seed takes seeds in [-2^63, 2^64)."""
    # No modulo: torch.compile may trace a seed as a symbol, of 64 bits.
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def device_key(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A key (seed, offset) that the host never sees, int64[2], by one of torch's own operators."""
    return torch.randint(2**63 - 1, (2,), generator=generator, device=device)


def _reserve(generator: torch.Generator) -> tuple[int, int]:
    """Seed and offset of a CUDA generator, which moves on by 4.

    From torch 2.14 on in one step, under the lock that torch's own kernels take. Before, torch has
    no such step: a kernel of its own that another thread launches in between gets the same words.
    """
    if hasattr(generator, "philox_state"):
        seed, offset, _ = generator.philox_state(4)
        return int(seed.item()), int(offset.item())
    with _LOCK:
        offset = generator.get_offset()
        generator.set_offset(offset + 4)
    return signed64(generator.initial_seed()), offset


def draw_key(device: torch.device, source: Source) -> Key:
    """On the host, or on the device while a CUDA graph is captured."""
    generator, seed, _, kind = source
    if kind == "keys":  # read by row
        return Key(0, 0)
    if seed is not None:
        return Key(seed, SEED_OFFSET)
    if device != _CPU and device.type == "cuda":  # to ask for a type takes longer
        if torch.cuda.is_current_stream_capturing():
            # Generator state may not be read here; each replay must read a key of its own.
            return Key(0, 0, device_key(device, generator))
        if generator is None:
            generator = torch.cuda.default_generators[device.index]
        return Key(*_reserve(generator))
    if _are_functorch_transforms_active() or _len_torch_dispatch_stack():
        word = torch.empty((), dtype=torch.int64, device="cpu")  # theirs to see, and to write into
    else:
        word = _word.tensor
    return Key(int(word.random_(-(2**63), None, generator=generator).item()), SEED_OFFSET)


def _product(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of a product of 32-bit words."""
    if torch._C._get_tracing_state() is None:
        product = word * constant  # wraps, which leaves all 64 bits right
        return product >> 32 & _WORD, product & _WORD
    # ONNX has >> for numbers that are not negative: as division.
    low = word * (constant & 0xFFFF)
    high = word * (constant >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) * 0x10000 + (low & 0xFFFF)


def _xor(a: Tensor, b: Tensor | int) -> Tensor:
    """a ^ b, of which torch's exporter by tracing knows no more than &."""
    return a ^ b if torch._C._get_tracing_state() is None else a + b - (a & b) * 2


def philox_normal(
    key: Key,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    samples: Tensor | None = None,
    kind: str | None = None,
) -> Tensor:
    """eps [B, D], of this shape: the noise contract in torch integer arithmetic. samples, kind: of
    the Source.

    Where a device lacks float64 it is drawn on the CPU: with float32 alone its digits differ.
    """
    if not has_float64(device):
        if key.on_device is not None:
            key = key._replace(on_device=key.on_device.cpu())
        samples = None if samples is None else samples.cpu()
        return philox_normal(key, shape, dtype, torch.device("cpu"), samples, kind).to(device)
    batch, event = shape
    seed: int | Tensor = key.seed
    offset: int | Tensor = key.offset
    if key.on_device is not None:
        seed, offset = key.on_device[0], key.on_device[1]
    groups = (event + 3) // 4
    if samples is None:
        group = torch.arange(batch * groups, device=device)
    elif kind == "ids":
        group = samples.reshape(-1, 1) * groups + torch.arange(groups, device=device)
    else:
        group = torch.arange(groups, device=device).expand(batch, groups)
        seed, offset = samples[:, :1], samples[:, 1:]
    zero = torch.zeros_like(group)
    counter = offset >> 2 & (1 << 62) - 1  # a logical shift
    c = [
        zero + (counter & _WORD),
        zero + (counter >> 32 & _WORD),
        group & _WORD,
        group >> 32 & _WORD,
    ]
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c[0], 0xD2511F53), _product(c[2], 0xCD9E8D57)
        c = [_xor(_xor(high1, c[1]), k0), low1, _xor(_xor(high0, c[3]), k1), low0]
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    lanes = []
    for radius_word, angle_word in ((c[0], c[1]), (c[2], c[3])):
        uniform = (radius_word.double() + 0.5) * 2.0**-32
        radius = torch.sqrt(-2.0 * torch.log(uniform))
        angle = angle_word.double() * (2.0 * math.pi * 2.0**-32)
        lanes += [radius * torch.cos(angle), radius * torch.sin(angle)]
    normals = torch.stack(lanes, dim=-1)
    if torch.compiler.is_compiling():  # a slice would tie a size that is left open to whole groups
        row, column = torch.arange(batch, device=device), torch.arange(event, device=device)
        return normals.flatten()[row[:, None] * (groups * 4) + column].to(dtype)
    return normals.reshape(batch, groups * 4)[:, :event].to(dtype).contiguous()
