"""Autocast: KL in float32, z in mu's dtype, and scaled losses that train."""

import pytest
import torch

import vaekl
from vaekl.testing import make_inputs


def vae(device, backend):
    torch.manual_seed(0)
    encoder = torch.nn.Linear(8, 6).to(device)
    decoder = torch.nn.Linear(3, 8).to(device)
    return encoder, decoder, vaekl.nn.ReparameterizeKL(backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, backend, device):
    """KL in float32, z in mu's dtype; the same numbers as without autocast on such inputs."""
    encoder, decoder, inner = vae(device, backend)
    images = torch.randn(4, 8, device=device)
    with torch.autocast(device, dtype=dtype):
        mu, logvar = encoder(images).chunk(2, dim=-1)
        out = inner(mu, logvar, seed=3)
        loss = decoder(out.z).float().square().mean() + out.kl + out.kl_of_mean
    assert (mu.dtype, out.z.dtype) == (dtype, dtype)
    assert out.kl.dtype == out.kl_of_mean.dtype == torch.float32
    expected = inner(mu.detach(), logvar.detach(), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(out, expected))
    loss.backward()
    assert encoder.weight.grad.dtype == torch.float32
    assert encoder.weight.grad.isfinite().all()
    assert encoder.weight.grad.abs().sum() > 0


def test_autocast_leaves_transforms_their_precision(backend, device):
    """Composed of plain operations, which autocast knows."""
    mu, logvar, eps = (make_inputs((4, 3), device=device, seed=s)[0] for s in range(3))
    call = lambda m: vaekl.reparameterize_kl(m, logvar, eps=eps, backend=backend)  # noqa: E731
    scalar = lambda m: sum(out.sin().sum() for out in call(m))  # noqa: E731
    expected = torch.func.grad(scalar)(mu)
    with torch.autocast(device, dtype=torch.bfloat16):
        torch.testing.assert_close(torch.func.grad(scalar)(mu), expected)


def test_a_loop_with_a_gradient_scaler_trains(backend, device):
    """Scaled losses: overflow is seen, skipped, and training goes on."""
    encoder, decoder, inner = vae(device, backend)
    data = torch.randn(64, 8, device=device) @ torch.randn(8, 8, device=device)
    weights = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(weights, lr=0.05)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40, growth_interval=5)
    losses, scales = [], []
    for _ in range(60):
        with torch.autocast(device, dtype=torch.float16):
            mu, logvar = encoder(data).chunk(2, dim=-1)
            z, kl, _ = inner(mu, logvar)
            loss = (decoder(z).float() - data).square().sum(-1).mean() + kl
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert min(scales) < 2.0**30  # the first steps overflowed, as they should
    assert losses[-1] < 0.6 * losses[0]
    assert all(w.isfinite().all() for w in weights)
