"""What only a device can show: launches, synchronisation, memory.

The rest of the suite runs on device tensors too where there is a device. Sizes past 2^31, races and
CUDA graphs are in the other ``test_gpu_*.py``; ``bench/gpu.sh`` runs them all.
"""

import warnings

import pytest
import torch

import vaekl
from vaekl import _plans
from vaekl.diagnostics import statistics
from vaekl.testing import CONFIGS, make_inputs, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]
MIB = 2**20


@pytest.fixture
def unpoisoned(_poisoned_memory):
    """New tensors are not filled: what a user's call does on the device, and nothing else."""
    torch.use_deterministic_algorithms(False)


def differentiable(shape, device, *, reduction="batchmean", dtype=torch.float32):
    """mu, logvar that need gradients, and upstream gradients for (z, kl, kl_of_mean)."""
    mu, logvar = (t.requires_grad_() for t in make_inputs(shape, dtype=dtype, device=device))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = (shape[:1] if reduction == "none" else (), ())
    upstream = [torch.randn(s, dtype=wide, device=device) for s in shapes]
    return mu, logvar, [torch.randn_like(mu), *upstream]


def run(mu, logvar, upstream, **options):
    """Forward and backward: [z, kl, kl_of_mean, dmu, dlogvar]."""
    call = lambda m, v: vaekl.reparameterize_kl(m, v, **options)  # noqa: E731
    return step(call, (mu, logvar), upstream).tensors


@pytest.mark.parametrize(
    ("config", "reduction", "mean_over", "dtype"),
    [
        ("default", "none", "batch", torch.float32),
        ("many", "batchmean", "batch", torch.float32),
        ("many", "none", "all", torch.bfloat16),
        ("loops", "none", "batch", torch.bfloat16),
        ("loops", "mean", "all", torch.float32),
        ("many", "none", "batch", torch.float64),
    ],
)
def test_small_cases(config, reduction, mean_over, dtype, device):
    """Every way to split the sums, against eager; bench/gpu.sh runs these under sanitizers too."""
    options = {"reduction": reduction, "mean_over": mean_over, "seed": 3}
    mu, logvar, upstream = differentiable((37, 42), device, reduction=reduction, dtype=dtype)
    with _plans.use_config(CONFIGS[config]):
        ours = run(mu, logvar, upstream, backend="triton", **options)
    for a, b in zip(ours, run(mu, logvar, upstream, backend="eager", **options)):
        torch.testing.assert_close(a, b)


def device_work(call):
    """Names of everything that runs on the device for `call`: kernels, copies, fills."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's own, which change with the version
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        events = profile.events()
    return [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("noise", [{}, {"seed": 1}], ids=["generator", "seed"])
@pytest.mark.parametrize(
    ("shape", "reduction", "mean_over"),
    [
        ((128, 20), "batchmean", "batch"),
        ((1000, 700), "batchmean", "batch"),
        ((1000, 700), "none", "all"),
    ],
)
def test_one_launch_each_way(shape, reduction, mean_over, noise, device, unpoisoned):
    """Sums included: nothing is copied, filled or reduced by another kernel."""
    mu, logvar, upstream = differentiable(shape, device, reduction=reduction)

    def call():
        run(mu, logvar, upstream, reduction=reduction, mean_over=mean_over, **noise)

    call()  # compiles; counters and scratch are there from now on
    device_work(call)  # the profiler, too, starts up
    names = device_work(call)
    assert [name.split("_kernel")[0] for name in names] == ["forward", "backward"], names


@pytest.mark.parametrize("prior", [None, "sample", "event"])
@pytest.mark.parametrize("shape", [(128, 20), (1000, 700), (50, 128, 20), (3, 9000)])
def test_log_densities_are_one_launch_each_way(shape, prior, device, unpoisoned):
    """Against eager, too; draws of one sample are read where they are."""
    batch_dims = len(shape) - 1
    mu, logvar = (t.expand(shape) for t in make_inputs(shape[-2:], device=device))
    eps, given = torch.randn(shape, device=device), [mu, logvar]
    if prior is not None:
        given += make_inputs(shape if prior == "sample" else shape[-1:], device=device, seed=1)

    def call(backend, *given):
        return vaekl.reparameterize_log_prob(
            *given[:2], prior=given[2:] or None, eps=eps, batch_dims=batch_dims, backend=backend
        )

    ours = lambda: step(lambda *x: call("triton", *x), given).tensors  # noqa: E731
    ours()  # compiles
    device_work(ours)
    names = [name.split("_kernel")[0] for name in device_work(ours)]
    assert [n for n in names if "log_prob" in n] == ["log_prob_forward", "log_prob_backward"], names
    eager = step(lambda *x: call("eager", *x), given).tensors
    for a, b in zip(ours(), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(128, 20), (1000, 700), (20_000, 33), (3, 9000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_statistics_are_one_launch(shape, dtype, device, unpoisoned):
    """And their sums are those of the eager backend, every time."""
    from vaekl.backends import triton as launcher  # needs triton

    mu, logvar = make_inputs(shape, dtype=dtype, device=device)
    sums = launcher.statistics(mu, logvar, 1)  # compiles; counters and scratch are there
    device_work(lambda: launcher.statistics(mu, logvar, 1))
    names = device_work(lambda: launcher.statistics(mu, logvar, 1))
    assert [name.split("_kernel")[0] for name in names] == ["statistics"], names
    expected = statistics._sums(mu, logvar, 1)
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-9)
    for _ in range(50):
        assert torch.equal(launcher.statistics(mu, logvar, 1), sums)


def test_the_host_never_waits(device, unpoisoned):
    mu, logvar, upstream = differentiable((1000, 700), device)
    noises = [
        {},
        {"seed": 1},
        {"eps": torch.randn_like(mu)},
        {"generator": torch.Generator(device).manual_seed(1)},
    ]
    for noise in noises:
        run(mu, logvar, upstream, **noise)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        for noise in noises:
            run(mu, logvar, upstream, **noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_outputs_and_gradients(dtype, device, unpoisoned):
    """z forward, two gradients backward; no copy, and nothing else of the inputs' size is kept."""
    mu, logvar, upstream = differentiable((16384, 1024), device, dtype=dtype)
    size = mu.numel() * mu.element_size()
    run(mu, logvar, upstream)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = vaekl.reparameterize_kl(mu, logvar)
    assert torch.cuda.max_memory_allocated() - before <= size + MIB
    gradients = torch.autograd.grad(tuple(out), (mu, logvar), upstream)
    assert torch.cuda.max_memory_allocated() - before <= 3 * size + MIB
    assert all(g.shape == mu.shape for g in gradients)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_the_current_one():
    results = []
    for device in ("cuda:0", "cuda:1"):
        mu, logvar, upstream = differentiable((1000, 70), device)
        upstream = [torch.ones_like(g) for g in upstream]
        generator = torch.Generator(device).manual_seed(5)
        outputs = run(mu, logvar, upstream, generator=generator)
        assert all(t.device == mu.device for t in outputs)
        results.append([t.cpu() for t in outputs])
    assert torch.cuda.current_device() == 0
    for here, there in zip(*results):
        torch.testing.assert_close(here, there)
