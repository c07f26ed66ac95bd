"""Activation checkpointing: what is computed again has the noise of the first time."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import vaekl
from vaekl.testing import make_inputs


def block(mu, logvar, backend, **options):
    """Two draws and both KLs, between operations that are computed again too."""
    mu, logvar = mu.sin(), logvar.cos()
    z, kl, kl_of_mean = vaekl.reparameterize_kl(mu, logvar, backend=backend, **options)
    again = vaekl.reparameterize(z, logvar, backend=backend)
    return (again * z).tanh().sum() + 2 * kl.sum() + 3 * kl_of_mean


def step(function, device):
    """The loss, its gradients, and the random state after."""
    leaves = [t.requires_grad_() for t in make_inputs((4, 6), device=device)]
    torch.manual_seed(5)
    loss = function(*leaves)
    loss.backward()
    state = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    return [loss.detach(), *(leaf.grad for leaf in leaves), state]


def equal(actual, expected):
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("noise", [{}, {"seed": 3}], ids=["generator", "seed"])
def test_gradients_are_the_same(noise, reentrant, backend, device):
    call = lambda m, v: block(m, v, backend, reduction="none", **noise)  # noqa: E731
    kept = lambda m, v: checkpoint(call, m, v, use_reentrant=reentrant)  # noqa: E731
    assert equal(step(kept, device), step(call, device))


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_torch_compile(reentrant, backend, device):
    torch._dynamo.reset()
    call = lambda m, v: block(m, v, backend)  # noqa: E731
    kept = lambda m, v: checkpoint(call, m, v, use_reentrant=reentrant).sin()  # noqa: E731
    compiled = torch.compile(kept, backend="aot_eager", fullgraph=True)
    assert equal(step(compiled, device), step(lambda m, v: call(m, v).sin(), device))
    torch._dynamo.reset()


def test_inside_inductor(device):
    torch._dynamo.reset()
    call = lambda m, v: block(m, v, "auto")  # noqa: E731
    kept = lambda m, v: checkpoint(call, m, v, use_reentrant=False)  # noqa: E731
    for a, b in zip(step(torch.compile(kept, fullgraph=True), device), step(call, device)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_around_torch_compile(backend, device):
    torch._dynamo.reset()
    call = lambda m, v: block(m, v, backend)  # noqa: E731
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    kept = lambda m, v: checkpoint(compiled, m, v, use_reentrant=False)  # noqa: E731
    assert equal(step(kept, device), step(call, device))
    torch._dynamo.reset()


class Sample(torch.nn.Module):
    """Half of the features are mu, half logvar."""

    def __init__(self, backend):
        super().__init__()
        self.inner = vaekl.nn.ReparameterizeKL(backend=backend)

    def forward(self, both):
        z, kl, _ = self.inner(*both.chunk(2, dim=-1))
        return z * (1 + kl)


def test_a_segmented_network(backend, device):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3, 8), Sample(backend), torch.nn.Linear(4, 8), Sample(backend)]
    network = torch.nn.Sequential(*layers).to(device)
    data = torch.randn(5, 3, device=device)
    found = []
    for call in (network, lambda x: checkpoint_sequential(network, 2, x, use_reentrant=False)):
        torch.manual_seed(1)
        weights = list(network.parameters())
        found.append(torch.autograd.grad(call(data).square().sum(), weights))
    assert equal(*found)


def test_a_generator_of_ones_own_is_not_restored(device):
    """As for torch.randn: checkpoint keeps torch's own generators alone, so the noise differs."""
    generator = torch.Generator(device).manual_seed(1)
    logvar = torch.zeros(4, 6, device=device, requires_grad=True)
    mu = torch.zeros(4, 6, device=device)
    found = []
    for call in (
        lambda v: vaekl.reparameterize(mu, v, generator=generator),
        lambda v: torch.exp(0.5 * v) * torch.randn(4, 6, generator=generator, device=device),
    ):
        z = checkpoint(call, logvar, use_reentrant=False)
        (slope,) = torch.autograd.grad(z, logvar, torch.ones_like(z))
        found.append(torch.equal(slope, 0.5 * z))
    assert found == [False, False]
