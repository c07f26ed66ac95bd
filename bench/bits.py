"""Did a change keep every bit? Random calls of the public functions, a digest of all they give.

    python bench/bits.py save before.json [--backend cpu] [--calls 4000]
    python bench/bits.py compare before.json     # after the change: exit code 1 if a bit differs

Call n is a function of n alone: function, shapes, dtypes, layouts, options, noise, threads, values
(some of them NaN, infinite or huge), which gradients are needed, and what is sent to which output.
What a call raises is compared too. TRITON_INTERPRET=1 runs the Triton kernels on the CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import screen
import torch
from torch import Tensor

import vaekl

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "sum", "batchmean", "mean")
CLAMPS = (None, None, (-1.0, 0.5), (-30, 20), (None, 0.3), (-0.2, None))
SPECIAL = (float("nan"), float("inf"), -float("inf"), 90.0, -200.0, 11.0, 0.0)
# Of several pieces, ranges and tiles of the kernels, and of nothing.
LARGE = ((200, 5000), (9999, 21), (3, 9001), (1, 40000), (70001, 1), (1024, 512), (100, 2049),
         (16, 4, 32, 32), (5000, 37), (20000, 4), (3, 8, 48, 50), (0, 5), (4, 0))  # fmt: skip
LAYOUTS = ("as is", "as is", "as is", "permuted", "half", "every other", "one row", "one value")


class Choices:
    """Of one call."""

    def __init__(self, n: int) -> None:
        self.generator = torch.Generator().manual_seed(n)

    def between(self, low: int, high: int) -> int:
        """An integer of [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def one_of(self, options: Sequence[Any]) -> Any:
        """One of these."""
        return options[self.between(0, len(options) - 1)]

    def shape(self, is_small: bool) -> tuple[int, ...]:
        """Of mu."""
        kind, most = self.between(0, 9), 12 if is_small else 60
        if kind < 5:
            return self.between(1, most), self.between(1, most)
        if kind < 8:
            return tuple(self.between(1, 6) for _ in range(self.between(1, 4)))
        return (3, 130) if is_small else self.one_of(LARGE)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Normal values of some layout; a few of them special."""
        values = torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64) * scale
        if values.numel() and self.between(0, 15) == 0:
            for special in SPECIAL:
                values.view(-1)[self.between(0, values.numel() - 1)] = special
        return self.laid_out(values.to(dtype))

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The tensor, or its first row or value, in other strides."""
        layout, rank = self.one_of(LAYOUTS), tensor.dim()
        if layout == "as is" or rank == 0 or tensor.numel() == 0:
            return tensor
        axis = self.between(0, rank - 1)
        if layout == "permuted":
            order = torch.randperm(rank, generator=self.generator).tolist()
            return tensor.permute(order).contiguous().permute([order.index(i) for i in range(rank)])
        if layout == "half":
            return torch.cat([tensor, tensor], axis).narrow(axis, 0, tensor.shape[axis])
        if layout == "every other":
            return tensor.repeat_interleave(2, axis)[
                (slice(None),) * axis + (slice(None, None, 2),)
            ]
        if layout == "one row":
            return tensor.narrow(axis, 0, 1).expand_as(tensor)
        return tensor.flatten()[:1].reshape([1] * rank).expand_as(tensor)


def digest(value: Any) -> str:
    """Of every bit, dtype, shape and stride; a NaN is a NaN."""
    if not isinstance(value, Tensor):
        return repr(value)
    plain = value.detach().contiguous()
    if plain.is_floating_point():
        plain = plain.masked_fill(plain.isnan(), torch.nan)
    raw = plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    found = hashlib.sha256(raw).hexdigest()[:16]
    return f"{found} {value.dtype} {tuple(value.shape)} {value.stride()}"


def call(n: int, backend: str, is_small: bool) -> dict[str, Any]:
    """The n-th: what it was, and digests of what it gave."""
    torch.manual_seed(n)
    choices = Choices(n)
    torch.set_num_threads(choices.one_of((1, 2, 2, 3)))
    shape, dtype = choices.shape(is_small), choices.one_of(DTYPES)
    dtypes = [choices.one_of(DTYPES) if n % 7 == 0 else dtype for _ in range(3)]
    scale = choices.one_of((1e-4, 1e-2, 1.0, 1.0, 5.0))
    inputs = [choices.tensor(shape, d, scale) for d in dtypes]
    options: dict[str, Any] = {"backend": backend}
    options["batch_dims"] = choices.between(0, len(shape)) if n % 3 == 0 or len(shape) == 1 else 1
    name = choices.one_of(("reparameterize_kl",) * 4 + (
        "reparameterize_kl_moments", "reparameterize_kl_moments", "reparameterize", "kl_loss",
        "kl_of_mean", "diagnose"))  # fmt: skip
    if name != "diagnose":
        options["clamp"] = choices.one_of(CLAMPS)
    if name in ("reparameterize_kl", "reparameterize_kl_moments", "kl_loss"):
        options["reduction"] = choices.one_of(REDUCTIONS)
    if name in ("reparameterize_kl", "reparameterize_kl_moments"):
        options["kl_of_mean"] = choices.one_of((True, True, False))
    if name != "kl_loss" and options.get("kl_of_mean", name == "kl_of_mean"):
        options["mean_over"] = choices.one_of(("batch", "batch", "all"))
    if name == "reparameterize":
        del options["batch_dims"]
    eps = inputs.pop() if name.startswith("reparameterize") and choices.between(0, 1) else None
    del inputs[2:]
    if name == "reparameterize_kl_moments":
        options["dim"] = choices.between(0, len(shape) - 1)
        whole = torch.cat([t.to(dtype) for t in inputs], options["dim"])
        inputs = [choices.laid_out(whole)]
    if name.startswith("reparameterize") and eps is None:
        generator = torch.Generator().manual_seed(n)
        seed = {"seed": choices.one_of((0, -5, 2**62 + 3, n))}
        options |= choices.one_of((seed, seed, {"generator": generator}, {}))
    leaves = [t.detach() for t in inputs] + ([] if eps is None else [eps.detach()])
    for leaf in leaves:
        leaf.requires_grad_(choices.between(0, 3) > 0)
    if eps is not None:
        options["eps"] = leaves[-1]
    told = {k: v for k, v in options.items() if not isinstance(v, Tensor | torch.Generator)}
    what = f"{name} {[(tuple(t.shape), t.stride(), t.dtype) for t in leaves]} {told}"
    try:
        return {"what": what, "gave": _gave(name, leaves, len(inputs), options, choices)}
    except Exception as error:
        return {"what": what, "gave": [f"{type(error).__name__}: {error}"]}


def _gave(
    name: str, leaves: list[Tensor], count: int, options: dict[str, Any], choices: Choices
) -> list[str]:
    results = getattr(vaekl, name)(*leaves[:count], **options)
    if name == "diagnose":
        return [f"{f.name} {digest(getattr(results, f.name))}" for f in fields(results)]
    outputs = [results] if isinstance(results, Tensor) else list(results)
    found = [digest(o) for o in outputs]
    used = [o for o in outputs if o is not None and o.requires_grad and choices.between(0, 4)]
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    if used and needed:
        upstream = [choices.tensor(o.shape, o.dtype) for o in used]
        gradients = torch.autograd.grad(used, needed, upstream, allow_unused=True)
        found += [digest(g) for g in gradients]
    return found


def main() -> int:
    """Save or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["save", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--backend", default="cpu", help="of save; compare takes the file's")
    parser.add_argument("--calls", type=int, default=4000, help="of save; 200 are many interpreted")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    before = json.loads(args.file.read_text()) if args.action == "compare" else {}
    backend = before.get("backend", args.backend)
    numbers = range(len(before["calls"]) if before else args.calls)
    is_small = backend == "triton"
    calls = [call(n, backend, is_small) for n in screen.track(numbers, "calls")]
    if not before:
        args.file.write_text(json.dumps({"backend": backend, "calls": calls}))
        raised = sum("Error: " in c["gave"][0] for c in calls)
        print(f"{len(calls)} calls of the {backend} backend, {raised} of which raise: {args.file}")
        return 0
    differing = [n for n in numbers if calls[n] != before["calls"][n]]
    for n in differing[:10]:
        print(f"call {n}: {calls[n]['what']}")
        for old, new in zip(before["calls"][n]["gave"], calls[n]["gave"]):
            print(f"    {old}" + ("" if old == new else f"  ->  {new}"))
    print(f"{len(differing)} of {len(calls)} calls differ")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
