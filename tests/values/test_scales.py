"""The second argument as log_std, std or var: values and gradients against the oracle."""

import itertools

import numpy as np
import pytest
import torch

import vaekl
from steps import check, scale_of
from vaekl import reference
from vaekl.reference import Oracle, torch_reparameterize_kl
from vaekl.testing import KL_BUDGET, make_inputs, step, worst

SCALES = list(reference.SCALES)
OTHERS = [name for name in SCALES if name != "logvar"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def inputs(scale, shape=(5, 12), size=1.0, **more):
    mu, logvar = make_inputs(shape, scale=size, **more)
    return mu, scale_of(scale, logvar)


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("mean_over", ["batch", "all"])
@pytest.mark.parametrize("clamp", [None, (-0.5, 0.7)])
@pytest.mark.parametrize("scale", OTHERS)
def test_values_and_gradients(scale, clamp, mean_over, reduction, backend, many_programs, device):
    check(inputs(scale, (7, 21), device=device), backend=backend, scale=scale, clamp=clamp,
          mean_over=mean_over, reduction=reduction)  # fmt: skip


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", OTHERS)
def test_dtypes_and_sizes(scale, dtype, size, storage, backend, device):
    """From a posterior that is all but the prior, to scales of e^10."""
    size = min(size, 4.0) if dtype is torch.float16 else size  # its range
    tensors = storage.store(*inputs(scale, dtype=dtype, size=size, device=device))
    check(tensors, storage=storage, backend=backend, scale=scale)


@pytest.mark.parametrize("scale", OTHERS)
@pytest.mark.parametrize("shape", [(7, 3), (300, 20), (2, 3, 4, 5)])
def test_shapes(scale, shape, backend, config, device):
    eps = make_inputs(shape, seed=9, device=device)[0]
    check(inputs(scale, shape, device=device), eps=eps, backend=backend, scale=scale)


@pytest.mark.parametrize("scale", SCALES)
def test_means_of_many_samples(scale, backend, device):
    """Half of them the same, at a bound: an error that grows with their number shows."""
    pair = inputs(scale, (20, 50), device=device)
    check(pair, backend=backend, scale=scale, batch_dims=2, clamp=(-0.2, np.inf))


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("clamp", [None, (-0.5, 0.7)])
@pytest.mark.parametrize("scale", OTHERS)
def test_block_by_block(scale, clamp, reduction):
    """What eager does with a large tensor on a CPU."""
    shape = (300, 500 * torch.get_num_threads())
    check(inputs(scale, shape), backend="eager", scale=scale, clamp=clamp, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5000, 1), (3000, 2), (1600, 5), (300, 33)])
@pytest.mark.parametrize("scale", SCALES)
def test_noise_of_several_blocks(scale, shape, dtype, device):
    """Drawn again in backward, where a worker's second block finds what its first has left."""
    pytest.importorskip("numba")
    mu, given = inputs(scale, shape, dtype=dtype, device="cpu")
    gradients = []
    for backend in ("cpu", "eager"):
        leaf = given.clone().requires_grad_()
        z = vaekl.reparameterize(mu, leaf, scale=scale, seed=5, backend=backend)
        gradients += torch.autograd.grad(z.sum(), leaf)
    limit = 5e-6 if dtype is torch.float32 else 1e-13
    torch.testing.assert_close(*gradients, rtol=limit, atol=limit)


WORST = {"std": [0.0, -1.0, torch.inf, torch.nan, 1e-45], "var": [0.0, -1.0, torch.inf, torch.nan]}


@pytest.mark.parametrize("bounds", [(-3.0, 2.0), (None, 2.0), (-3.0, None)])
@pytest.mark.parametrize("scale", ["std", "var"])
@pytest.mark.parametrize("term", ["z", "kl", "kl_of_mean"])
def test_no_nan_leaks_where_clamp_has_no_gradient(term, scale, bounds, device):
    """On the composed road, and in second derivatives."""
    lo, hi = (-np.inf if bounds[0] is None else bounds[0]), bounds[1] or np.inf
    values = torch.tensor(WORST[scale], dtype=torch.float64, device=device)
    logvar = values.log() * (2 if scale == "std" else 1)
    values = values[~((logvar > lo) & (logvar < hi)) & ~((logvar == lo) | (logvar == hi))]

    def loss(s):
        mu = torch.zeros_like(s)
        options = {"scale": scale, "clamp": bounds}
        if term == "z":
            return vaekl.reparameterize(mu, s, seed=1, **options).sum()
        call = vaekl.kl_loss if term == "kl" else vaekl.kl_of_mean
        return call(mu, s, batch_dims=0, **options)

    for value in values:
        given = torch.stack([value, torch.ones_like(value)])
        assert torch.func.grad(loss)(given)[0] == 0, value
        leaf = given.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        assert first[0] == 0
        if first.requires_grad:
            (second,) = torch.autograd.grad(first[0], leaf, allow_unused=True)
            assert second is None or second[0] == 0, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", ["std", "var"])
def test_every_distance_to_1(scale, dtype, backend, device):
    """One element each, so that no sum hides an error: each side of the seams, too."""
    near = torch.logspace(-7 if dtype is torch.float32 else -12, -0.31, 600, dtype=torch.float64)
    far = torch.logspace(-30, 15, 900, dtype=torch.float64)
    seams = torch.tensor([0.5**0.5, 2**0.5, 0.625, 1.375, 1.0], dtype=torch.float64)
    around = seams[:, None] * (1 + torch.linspace(-1e-6, 1e-6, 41, dtype=torch.float64))
    values = torch.cat([1 + near, 1 - near, far, around.flatten()]).to(device, dtype)
    mu = torch.zeros_like(values)
    kl = vaekl.kl_loss(mu, values, scale=scale, reduction="none", batch_dims=1, backend=backend)
    exact = Oracle(mu, values, scale=scale, reduction="none").kl
    assert worst(kl, exact, KL_BUDGET[dtype] * exact) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clamp", [None, (-3.0, 2.0)])
@pytest.mark.parametrize("scale", ["std", "var"])
def test_without_a_logarithm(scale, clamp, dtype, backend, device):
    """What torch makes of its logarithm; the smallest numbers have one."""
    tiny = torch.finfo(dtype).smallest_normal
    values = [0.0, -1.0, torch.inf, torch.nan, tiny, tiny / 8]
    given = torch.tensor([values], dtype=dtype, device=device)
    mu = torch.zeros_like(given)
    options = {"scale": scale, "clamp": clamp, "batch_dims": 2, "reduction": "none"}
    kl = vaekl.kl_loss(mu, given, backend=backend, **options)
    exact = Oracle(mu, given, **options).kl
    assert worst(kl, exact, KL_BUDGET[dtype] * np.abs(exact)) <= 1


def test_a_std_of_0_is_no_noise(backend, device):
    """Its gradient is that of plain code: eps dz."""
    mu, eps = torch.randn(2, 3, 8, device=device)
    std = torch.zeros_like(mu).requires_grad_()
    z = vaekl.reparameterize(mu, std, scale="std", eps=eps, backend=backend)
    assert torch.equal(z, mu)
    (gradient,) = torch.autograd.grad(z.sum(), std)
    assert torch.equal(gradient, eps)


OF_OUTPUTS = itertools.product([None, 1.0], [None, [0.0, 0.0], [0.0, 1.0]], [None, 0.0, 1.0, -30.0])


@pytest.mark.parametrize(("of_z", "of_kl", "of_mean"), list(OF_OUTPUTS)[1:])
@pytest.mark.parametrize("scale", ["std", "var"])
def test_an_infinite_slope_as_plain_torch(scale, of_z, of_kl, of_mean, backend, device):
    """At 0 a logarithm makes NaN of a gradient of 0, but one that is absent is not multiplied; and
    the gradients of both KLs are added before.
    """
    upstream = [None if g is None else torch.tensor(g, device=device) for g in (of_kl, of_mean)]
    given = torch.tensor([[0.0, 1.0, 2.0, torch.inf], [0.0, 0.7, 0.7, 0.7]], device=device)
    mu, eps = torch.full_like(given, 0.3), torch.full_like(given, 1.5)
    upstream = [None if of_z is None else torch.full_like(mu, of_z), *upstream]
    options = {"scale": scale, "reduction": "none"}
    found, plain = (
        step(lambda v, f=function, o=more: f(mu, v, eps=eps, **o), [given], upstream).gradients[0]
        for function, more in (
            (vaekl.reparameterize_kl, {**options, "backend": backend}),
            (torch_reparameterize_kl, options),
        )
    )
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5, equal_nan=True)
    exact = torch.tensor(Oracle(mu, given, eps, **options).gradients(*upstream)["dlogvar"])
    torch.testing.assert_close(found.cpu(), exact.float(), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("scale", SCALES)
def test_the_form_makes_no_difference(scale, backend, device):
    """But that of rounding the scale, to kl_of_mean neither."""
    mu, logvar = make_inputs((6, 8), dtype=torch.float64, device=device)
    given = scale_of(scale, logvar)
    found = vaekl.reparameterize_kl(mu, given, scale=scale, seed=3, backend=backend)
    expected = vaekl.reparameterize_kl(mu, logvar, seed=3, backend=backend)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
    of_mean = vaekl.kl_of_mean(mu, given, scale=scale, backend=backend)
    torch.testing.assert_close(of_mean, found.kl_of_mean, rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", OTHERS)
def test_numbers_broadcast(scale, backend, device):
    mu, _ = make_inputs((6, 8), device=device)
    full = vaekl.kl_loss(mu, torch.full_like(mu, 0.7), scale=scale, backend=backend)
    assert torch.equal(vaekl.kl_loss(mu, 0.7, scale=scale, backend=backend), full)


@pytest.mark.parametrize("clamp", [None, (-0.6, 0.8)])
@pytest.mark.parametrize("scale", OTHERS)
def test_derivatives_of_every_order(scale, clamp, storage, backend, device):
    mu, given = inputs(scale, (2, 3), dtype=torch.float64, device=device)
    eps = torch.randn(2, 3, dtype=torch.float64, device=device)
    tensors = [t.requires_grad_() for t in storage.store(mu, given)]

    def call(*tensors):
        return tuple(storage.call(*tensors, eps, scale=scale, clamp=clamp, backend=backend))

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("scale", OTHERS)
def test_transforms(scale, device):
    """Of torch.func, forward mode too: what reverse mode gives."""
    mu, given = inputs(scale, (3, 2, 4), dtype=torch.float64, device=device)

    def loss(m, s):
        return (
            vaekl.kl_loss(m, s, scale=scale) + vaekl.reparameterize(m, s, scale=scale, seed=1).sum()
        )

    by_sample = torch.func.vmap(torch.func.grad(loss, (0, 1)))(mu, given)
    for i in range(3):
        leaves = [t[i].clone().requires_grad_() for t in (mu, given)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for a, b in zip(by_sample, expected):
            torch.testing.assert_close(a[i], b, rtol=1e-12, atol=1e-13)
    tangents = torch.randn_like(mu[0]), torch.randn_like(mu[0])
    _, tangent = torch.func.jvp(loss, (mu[0], given[0]), tangents)
    exact = sum((g[0] * t).sum() for g, t in zip(by_sample, tangents))
    torch.testing.assert_close(tangent, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("packed", [False, True])
def test_modules_and_packed_moments(packed, device):
    mu, std = inputs("std", device=device)
    expected = vaekl.reparameterize_kl(mu, std, scale="std", seed=2)
    if packed:
        found = vaekl.reparameterize_kl_moments(torch.cat([mu, std], 1), scale="std", seed=2)
    else:
        module = vaekl.nn.ReparameterizeKL(scale="std")
        assert "scale='std'" in repr(module)
        found = module(mu, std, seed=2)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scale", ["sigma", None, 2.0])
def test_unknown_forms_are_named(scale):
    mu, logvar = make_inputs((2, 3))
    for call in (vaekl.reparameterize_kl, vaekl.reparameterize, vaekl.kl_loss, vaekl.kl_of_mean):
        with pytest.raises(
            ValueError, match="scale must be one of 'logvar', 'log_std', 'std', 'var'"
        ):
            call(mu, logvar, scale=scale)
    with pytest.raises(ValueError, match="scale must be one of"):
        vaekl.nn.ReparameterizeKL(scale=scale)
