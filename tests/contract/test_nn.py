"""vaekl.nn.ReparameterizeKL: the function, as a module."""

import copy
import pickle

import pytest
import torch

import vaekl
from vaekl.testing import make_inputs


def test_training_samples_and_eval_gives_the_mode(backend, device):
    mu, logvar = make_inputs((4, 3), device=device)
    module = vaekl.nn.ReparameterizeKL(backend=backend, clamp=(-1, 1))
    expected = vaekl.reparameterize_kl(mu, logvar, seed=2, clamp=(-1, 1), backend=backend)
    for a, b in zip(module(mu, logvar, seed=2), expected):
        assert torch.equal(a, b)
    before = torch.get_rng_state()
    z, kl, of_mean = module.eval()(mu, logvar)
    assert torch.equal(z, mu)
    assert torch.equal(kl, expected.kl)
    assert torch.equal(of_mean, expected.kl_of_mean)
    assert torch.equal(torch.get_rng_state(), before)
    module.sample_in_eval = True
    assert torch.equal(module(mu, logvar, seed=2).z, expected.z)


def test_mode_has_the_dtype_of_a_sample(device):
    mu, logvar = make_inputs((4, 3), dtype=torch.bfloat16, logvar_dtype=torch.float32)
    module = vaekl.nn.ReparameterizeKL().eval()
    assert module(mu, logvar).z.dtype == module.train()(mu, logvar).z.dtype == torch.float32


def test_options_reach_the_function(backend, device):
    mu, logvar = make_inputs((2, 4, 3), device=device)
    options = {"reduction": "none", "kl_of_mean": False, "batch_dims": 2, "backend": backend}
    out = vaekl.nn.ReparameterizeKL(**options)(mu, logvar)
    assert out.kl.shape == (2, 4)
    assert out.kl_of_mean is None
    all_axes = vaekl.nn.ReparameterizeKL(mean_over="all", backend=backend)(mu, logvar)
    expected = vaekl.kl_of_mean(mu, logvar, mean_over="all", backend=backend)
    assert torch.equal(all_axes.kl_of_mean, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "x"},
        {"mean_over": "x"},
        {"backend": "x"},
        {"batch_dims": -1},
        {"clamp": (1, 0)},
    ],
)
def test_bad_options_fail_at_construction(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        vaekl.nn.ReparameterizeKL(**options)


def test_noise_is_checked_in_eval_too():
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="seed must be an int"):
        vaekl.nn.ReparameterizeKL().eval()(x, x, seed=1.5)


def test_copy_pickle_and_repr():
    module = vaekl.nn.ReparameterizeKL(reduction="sum", clamp=(-30.0, 20.0))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)
    assert "reduction='sum'" in repr(module)
    assert not module.state_dict()


def test_a_small_vae_trains(backend, device):
    torch.manual_seed(0)
    data = torch.randn(64, 8, device=device) @ torch.randn(8, 8, device=device)
    encoder, decoder = torch.nn.Linear(8, 4).to(device), torch.nn.Linear(2, 8).to(device)
    loss_module = vaekl.nn.ReparameterizeKL(backend=backend)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=0.05)
    losses = []
    for _ in range(30):
        mu, logvar = encoder(data).chunk(2, dim=-1)
        z, kl, _ = loss_module(mu, logvar)
        loss = (decoder(z) - data).pow(2).sum(-1).mean() + kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_noise_is_given_by_name():
    """Nothing but None without a name, which torch's ONNX exporter by tracing gives."""
    mu, logvar = make_inputs((2, 3))
    module = vaekl.nn.ReparameterizeKL().eval()
    assert torch.equal(module(mu, logvar, None, None).kl, module(mu, logvar).kl)
    with pytest.raises(TypeError, match=r"seed, sample_ids by name only; got 3 arg"):
        module(mu, logvar, torch.zeros(2, 3))
