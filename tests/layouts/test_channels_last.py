"""Channels that come last in memory are read in its order, and keep the noise of their place."""

import pytest
import torch

import vaekl
from vaekl._spec import Operands, Spec
from vaekl.backends import strided
from vaekl.testing import make_inputs, step


def last(tensor):
    return tensor.to(memory_format=torch.channels_last)


def channels(mu, logvar):
    """That the kernels are told of."""
    spec = Spec(True, "none", "batch", 1, "logvar", None, "triton")
    arrangement = strided.arrange_forward(spec, Operands(mu, logvar, None))
    return strided.in_memory_order(arrangement).view.channels


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 4, 4, 8), 4),
        ((2, 256, 2, 2), 256),
        ((2, 512, 2, 2), 1),  # more than a block has
        ((3, 6, 4, 4), 1),  # no power of 2
        ((3, 4, 3, 3), 1),  # groups of noise over two channels
    ],
)
def test_which_are_read_in_the_order_of_memory(shape, expected):
    mu, logvar = (last(tensor) for tensor in make_inputs(shape))
    assert channels(mu, logvar) == expected
    assert channels(*last(torch.cat([mu, logvar], 1)).chunk(2, 1)) == expected
    assert channels(mu, logvar.contiguous()) == 1
    assert channels(mu.contiguous(), logvar.contiguous()) == 1
    number = torch.zeros(()).expand(shape)
    assert channels(mu, number) == expected


def check(shape, storage, device, **options):
    """Values and gradients, of contiguous tensors by torch's operators."""
    mu, logvar = make_inputs(shape, device=device)
    options["seed"] = 3
    expected = step(
        lambda m, v: vaekl.reparameterize_kl(m, v, backend="eager", **options), (mu, logvar)
    )
    tensors = [last(tensor) for tensor in storage.store(mu, logvar)]
    found = step(lambda *t: storage.call(*t, backend="triton", **options), tensors)
    for a, b in zip(found.outputs, expected.outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=3e-6)
    gradients = storage.halves(*found.gradients)
    for a, b in zip(gradients, expected.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    assert found.outputs[0].is_contiguous(memory_format=torch.channels_last)


OPTIONS = [{"reduction": "batchmean"}, {"reduction": "none", "mean_over": "all"}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(3, 4, 4, 8), (5, 2, 2, 2), (2, 64, 2, 2), (3, 16, 2, 6)])
def test_values_and_gradients(shape, options, storage, device):
    check(shape, storage, device, **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(3, 4, 4, 6), (5, 2, 2, 2)])
def test_several_programs(shape, options, storage, config, device):
    check(shape, storage, device, **options)


@pytest.mark.parametrize("dz", ["channels first", "a number", "none"])
def test_backward_in_another_order_than_forward(dz, config, device):
    """The means that forward keeps are in the order of the event."""
    mu, logvar = make_inputs((3, 4, 4, 8), device=device)
    upstream = {
        "channels first": torch.randn(3, 4, 4, 8, device=device),
        "a number": torch.tensor(0.7, device=device).expand(3, 4, 4, 8),
        "none": None,
    }[dz]
    upstream = (upstream, torch.tensor(0.3, device=device), torch.tensor(1.3, device=device))
    call = lambda m, v, b: vaekl.reparameterize_kl(m, v, backend=b, seed=3)  # noqa: E731
    expected = step(lambda m, v: call(m, v, "eager"), (mu, logvar), upstream)
    found = step(lambda m, v: call(m, v, "triton"), (last(mu), last(logvar)), upstream)
    for a, b in zip(found.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
