"""Packed moments and distributions on a device: launches, memory, alignment, CPU generators."""

import pytest
import torch

import vaekl
from vaekl.distributions import DiagonalGaussianDistribution
from vaekl.testing import large_operators, make_inputs, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


@pytest.mark.parametrize("shape", [(64, 42), (63, 40), (16, 8, 32, 32), (2, 32, 5, 9, 16)])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_two_tensors(shape, dim, dtype, device):
    """Halves whose second starts at any address, of inputs and of the gradient."""
    if shape[dim] % 2:
        pytest.skip("no two halves")
    gradients = []
    for call in (
        lambda m: vaekl.reparameterize_kl_moments(m, dim=dim, seed=3, backend="triton"),
        lambda m: vaekl.reparameterize_kl(*m.chunk(2, dim), seed=3, backend="triton"),
    ):
        for start in (0, 1):
            flat = torch.empty(torch.Size(shape).numel() + start, dtype=dtype, device=device)
            values = make_inputs(shape, dtype=dtype, device=device)[0]
            moments = flat[start:].view(shape).copy_(values)
            gradients += step(call, [moments]).gradients
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def test_one_gradient_and_no_copies(device):
    torch.use_deterministic_algorithms(False)  # new tensors are not filled
    moments = make_inputs((64, 8, 32, 32), device=device)[0]
    upstream = (torch.randn(64, 4, 32, 32, device=device), torch.ones((), device=device), None)

    def call():
        return step(
            lambda m: vaekl.reparameterize_kl_moments(m, kl_of_mean=False, backend="triton"),
            [moments], upstream,
        )  # fmt: skip

    call()
    found = large_operators(call, moments.numel() // 2)
    assert not {"cat", "copy_", "clone", "contiguous", "zeros"} & {name for name, _ in found}
    sizes = sorted(allocated for _, allocated in found if allocated)
    assert sizes == [moments.numel() * 2, moments.numel() * 4]


def test_sample_and_kl_is_one_launch_each_way(device):
    torch.use_deterministic_algorithms(False)
    posterior = DiagonalGaussianDistribution(
        make_inputs((4, 8, 64, 64), device=device)[0].requires_grad_()
    )
    posterior.sample_and_kl()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        posterior.sample_and_kl()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if not kernels:
        pytest.skip("the profiler cannot see this device")
    assert len([e for e in kernels if not e.is_user_annotation]) == 1


def test_a_cpu_generator_gives_the_noise_it_gives_on_the_cpu(device):
    """To rounding: the key is drawn from the generator, the noise where the tensor is."""
    pytest.importorskip("numba")  # without it CPU tensors get torch.randn's noise
    moments = make_inputs((3, 8, 4, 4))[0]
    draws = [
        DiagonalGaussianDistribution(moments.to(d)).sample(torch.Generator().manual_seed(4)).cpu()
        for d in ("cpu", device)
    ]
    torch.testing.assert_close(*draws, rtol=1e-5, atol=1e-5)
