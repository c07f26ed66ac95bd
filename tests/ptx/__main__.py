"""What launches do, counted: `python -m ptx [sm_90]` in tests/, without TRITON_INTERPRET.

Instructions and load steps (counts.py) of the median program and of the last, which finishes the
sums; 32-byte sectors that a warp's load touches.
"""

import sys
from typing import Any

import numpy as np
import torch

import vaekl
from ptx import launcher
from ptx.counts import Counts
from vaekl import _validate
from vaekl.backends import triton
from vaekl.testing import make_inputs

CASES = [
    ((128, 20), torch.float32, "contiguous", {}),
    ((1024, 512), torch.float32, "contiguous", {}),
    ((1024, 512), torch.float32, "contiguous", {"reduction": "none"}),
    ((1, 131072), torch.bfloat16, "contiguous", {}),
    ((4, 65536), torch.float32, "contiguous", {"reduction": "none"}),
    ((1, 700000), torch.bfloat16, "contiguous", {"reduction": "none"}),
    ((16, 16384), torch.float32, "contiguous", {"reduction": "none", "mean_over": "all"}),
    ((16, 64, 16, 16), torch.float32, "contiguous", {}),
    ((16, 64, 16, 16), torch.float32, "channels_last", {}),
    ((4, 4, 64, 64), torch.float32, "contiguous", {}),
    ((4, 4, 64, 64), torch.float32, "channels_last", {}),
    ((4, 16, 32, 32), torch.bfloat16, "contiguous", {}),
    ((4, 16, 32, 32), torch.bfloat16, "channels_last", {}),
    ((4, 16, 32, 32), torch.bfloat16, "packed channels_last", {}),
    ((16, 64, 16, 16), torch.float32, "packed channels_last", {}),
    ((16, 64, 16, 16), torch.float32, "transposed", {}),
]
STATISTICS = [(1024, 512), (4096, 128)]


def run(shape: tuple[int, ...], dtype: torch.dtype, layout: str, options: dict[str, Any]) -> None:
    """Forward and backward, as a training step would call them."""
    packed, layout = layout.startswith("packed"), layout.removeprefix("packed ")
    leaves = make_inputs(shape, dtype=dtype, layout=layout)
    call = vaekl.reparameterize_kl
    if packed:
        moments = torch.cat(leaves, 1).to(memory_format=torch.channels_last)
        call, leaves = vaekl.reparameterize_kl_moments, (moments,)
    leaves = [tensor.requires_grad_() for tensor in leaves]
    outputs = call(*leaves, seed=1, backend="triton", **options)
    # As convolutions would give them: in the order that the outputs have in memory.
    upstream = [torch.empty_like(output).normal_() for output in outputs]
    torch.autograd.grad(outputs, leaves, upstream)


def main(target: str = "sm_90") -> None:
    launcher.use(target)
    _validate._interpreting = lambda: True  # CPU tensors may go to the Triton path
    print(
        "launch, programs, instructions (median, last), load steps (median, last), sectors a load"
    )
    for case in CASES:
        with launcher.recorded() as launches:
            run(*case)
        shape, dtype, layout, options = case
        tell(launches, shape, str(dtype)[6:], layout, *options.values())
    for shape in STATISTICS:
        with launcher.recorded() as launches:
            triton.statistics(*make_inputs(shape), 1)
        tell(launches, shape, "float32", "contiguous")


def tell(launches: list[tuple[str, Counts]], shape: tuple[int, ...], *what: str) -> None:
    """A line for each launch."""
    for name, counts in launches:
        values = [
            f"{np.median(each):.0f}, {each[counts.last]}"
            for each in (counts.instructions, counts.load_steps)
        ]
        sectors = f"{counts.sectors_per_request(loads=True):.2f}"
        launch = " ".join([name, str(list(shape)), *what])
        print(launch, len(counts.instructions), *values, sectors, sep="; ")


if __name__ == "__main__":
    main(*sys.argv[1:])
