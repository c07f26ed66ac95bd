"""What launches do, counted: `python -m ptx [sm_90]` in tests/, without TRITON_INTERPRET.

Instructions and load steps (counts.py) of the median program and of the last, which finishes the
sums; 32-byte sectors that a warp's load touches.
"""

import sys

import numpy as np
import torch

import vaekl
from ptx import launcher
from vaekl import _validate
from vaekl.testing import make_inputs, step

CASES = [
    ((128, 20), torch.float32, "contiguous", {}),
    ((1024, 512), torch.float32, "contiguous", {}),
    ((1024, 512), torch.float32, "contiguous", {"reduction": "none"}),
    ((1, 131072), torch.bfloat16, "contiguous", {}),
    ((4, 65536), torch.float32, "contiguous", {"reduction": "none"}),
    ((1, 700000), torch.bfloat16, "contiguous", {"reduction": "none"}),
    ((16, 16384), torch.float32, "contiguous", {"reduction": "none", "mean_over": "all"}),
    ((16, 64, 16, 16), torch.float32, "channels_last", {}),
    ((16, 64, 16, 16), torch.float32, "transposed", {}),
]


def main(target: str = "sm_90") -> None:
    launcher.use(target)
    _validate._interpreting = lambda: True  # CPU tensors may go to the Triton path
    print(
        "launch, programs, instructions (median, last), load steps (median, last), sectors a load"
    )
    for shape, dtype, layout, options in CASES:
        pair = make_inputs(shape, dtype=dtype, layout=layout)
        call = {"seed": 1, "backend": "triton", **options}
        with launcher.recorded() as launches:
            step(lambda mu, logvar, o=call: vaekl.reparameterize_kl(mu, logvar, **o), pair)
        for name, counts in launches:
            values = [
                f"{np.median(each):.0f}, {each[counts.last]}"
                for each in (counts.instructions, counts.load_steps)
            ]
            what = [name, str(list(shape)), str(dtype)[6:], layout, *map(str, options.values())]
            sectors = f"{counts.sectors_per_request(loads=True):.2f}"
            print(" ".join(what), len(counts.instructions), *values, sectors, sep="; ")


if __name__ == "__main__":
    main(*sys.argv[1:])
