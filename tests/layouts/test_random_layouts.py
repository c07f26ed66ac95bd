"""Random layouts and options: the cpu kernels against plain torch operators."""

import random

import pytest
import torch

import vaekl
from vaekl.testing import random_upstream, step

SIZES = [1, 2, 3, 5, 8, 33, 64, 100]
WIDE = [4, 128, 513, 1000, 1024, 2048, 2500, 5000]
MOST_ELEMENTS = 100_000


def tensor(draw, shape):
    """Axes in any order in memory, with gaps; now and then an expanded one."""
    order = draw.sample(range(len(shape)), len(shape))
    memory = torch.randn([shape[axis] * draw.choice([1, 1, 2]) for axis in order])
    values = memory[tuple(slice(shape[axis]) for axis in order)]
    values = values.permute([order.index(axis) for axis in range(len(shape))])
    if draw.random() < 0.15:
        values = values.narrow(draw.randrange(len(shape)), 0, 1).expand(shape)
    return values


def call(draw):
    """Inputs, upstream gradients and options."""
    shape = [draw.choice(SIZES) for _ in range(draw.choice([2, 3, 3, 4]))]
    if draw.random() < 0.4:
        shape[-1] = draw.choice(WIDE)
    while torch.Size(shape).numel() > MOST_ELEMENTS:
        shape[draw.randrange(len(shape))] = 2
    options = {
        "reduction": draw.choice(["none", "sum", "batchmean", "mean", "per_dim"]),
        "mean_over": draw.choice(["batch", "all"]),
        "batch_dims": min(draw.choice([1, 1, 2]), len(shape)),
        "clamp": draw.choice([None, (-1.0, 1.0)]),
        **({"eps": tensor(draw, shape)} if draw.random() < 0.4 else {"seed": 3}),
    }
    if draw.random() < 0.4:
        event = shape[options["batch_dims"] :]
        is_shared = draw.random() < 0.6 and event and options["mean_over"] == "batch"
        options["prior"] = [tensor(draw, event if is_shared else shape) for _ in range(2)]
        options["kl_of_mean"] = bool(is_shared)
    return tensor(draw, shape), tensor(draw, shape), tensor(draw, shape), options


def results(mu, logvar, dz, options, backend):
    """Outputs and gradients."""
    options = dict(options)
    prior = options.pop("prior", ())

    def call(m, v, *p):
        out = vaekl.reparameterize_kl(m, v, prior=p or None, backend=backend, **options)
        return [t for t in out if t is not None]

    batch = options["batch_dims"]
    kls = {"none": mu.shape[:batch], "per_dim": mu.shape[batch:]}.get(options["reduction"], ())
    of_mean = [torch.empty(())] if options.get("kl_of_mean", True) else []
    upstream = [dz, *random_upstream([torch.empty(kls), *of_mean])]
    return step(call, (mu, logvar, *prior), upstream).tensors


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 12))]
)
def test_cpu_as_eager(seed, device):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    if device != "cpu":
        pytest.skip("the cpu backend takes tensors on the CPU")
    for _ in range(25):
        mu, logvar, dz, options = call(draw)
        ours, eager = (results(mu, logvar, dz, options, backend) for backend in ("cpu", "eager"))
        told = f"{tuple(mu.shape)} {mu.stride()} {logvar.stride()} {dz.stride()} {options}"
        for a, b in zip(ours, eager):
            scale = max(1.0, float(b.detach().abs().max()))
            torch.testing.assert_close(
                a, b, rtol=3e-5, atol=3e-5 * scale, msg=lambda m, told=told: f"{told}\n{m}"
            )
