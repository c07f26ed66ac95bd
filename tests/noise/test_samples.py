"""Noise by sample: sample_ids, and keys of single samples, on all backends and roads."""

import numpy as np
import pytest
import torch

import vaekl
from vaekl import _plans
from vaekl.distributions import DiagonalGaussianDistribution
from vaekl.reference import SEED_OFFSET, Oracle, normal, to_numpy
from vaekl.testing import EPS_BUDGET, make_inputs, step, unit, worst

# Ragged, idle lanes, several programs per axis, rows that other calls lay end to end or beside each
# other; batch axes, an event of several axes.
SHAPES = [((6, 13), 1), ((37, 1), 1), ((50, 2), 1), ((9, 3, 5), 2), ((5, 4, 3, 2), 1), ((3, 70), 1)]
LARGE = 2**40 + 3  # whose groups need both words of the counter


def ids_of(shape, batch_dims, device):
    """In no order, one of them twice, one beyond 32 bits."""
    count = int(np.prod(shape[:batch_dims]))
    ids = torch.randperm(4 * count)[:count]
    ids[0], ids[-1] = ids[1], LARGE
    return ids.reshape(shape[:batch_dims]).to(device)


def zeros(shape, dtype, device):
    """Of which z is eps."""
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "batch_dims"), SHAPES)
def test_the_oracles_noise(shape, batch_dims, dtype, backend, config, device):
    mu, ids = zeros(shape, dtype, device), ids_of(shape, batch_dims, device)
    options = {"batch_dims": batch_dims, "seed": -5, "backend": backend, "reduction": "per_dim"}
    z = vaekl.reparameterize_kl(mu, mu, sample_ids=ids, **options).z
    sizes = int(np.prod(shape[:batch_dims])), int(np.prod(shape[batch_dims:]))
    exact = normal(-5, SEED_OFFSET, *sizes, to_numpy(ids).astype(np.int64))
    assert np.abs(to_numpy(z).reshape(sizes) - exact).max() <= EPS_BUDGET[dtype]
    counted = torch.arange(sizes[0], device=device).reshape(ids.shape)
    assert torch.equal(
        vaekl.reparameterize_kl(mu, mu, sample_ids=counted, **options).z,
        vaekl.reparameterize_kl(mu, mu, **options).z,
    )


def test_events_of_several_tiles(backend, device):
    mu, ids = zeros((3, 5000), torch.float32, device), ids_of((3, 5000), 1, device)
    z = vaekl.reparameterize(mu, mu, seed=1, sample_ids=ids, backend=backend)
    exact = normal(1, SEED_OFFSET, 3, 5000, to_numpy(ids).astype(np.int64))
    assert np.abs(to_numpy(z) - exact).max() <= EPS_BUDGET[torch.float32]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reduction", ["none", "batchmean", "per_dim"])
def test_a_step(reduction, packed, backend, config, device):
    """Backward draws what forward drew."""
    shape = (11, 6, 3)
    mu, logvar = (t.to(device) for t in make_inputs(shape, dtype=torch.float32))
    ids, means = ids_of(shape, 1, device), reduction != "none"
    options = {"reduction": reduction, "kl_of_mean": means}

    def call(*given):
        noise = {"seed": 3, "sample_ids": ids, "backend": backend}
        if packed:
            return vaekl.reparameterize_kl_moments(*given, **noise, **options)
        return vaekl.reparameterize_kl(*given, **noise, **options)

    given = [torch.cat([mu, logvar], 1)] if packed else [mu, logvar]
    out, upstream, gradients = step(call, given)
    eps = normal(3, SEED_OFFSET, 11, 18, to_numpy(ids).astype(np.int64)).reshape(shape)
    oracle = Oracle(mu, logvar, eps, reduction=reduction)
    exact = oracle.gradients(
        dz=upstream[0], dkl=upstream[1], dkl_of_mean=upstream[2] if means else None
    )
    u, std = unit(torch.float32), np.exp(0.5 * to_numpy(logvar))
    of_noise = EPS_BUDGET[torch.float32] * std
    assert worst(out.z, oracle.z, of_noise + 4 * u * (np.abs(oracle.z) + np.abs(oracle.mu))) <= 1
    found = gradients[0].chunk(2, 1) if packed else gradients
    for gradient, name in zip(found, ("dmu", "dlogvar"), strict=True):
        largest = np.abs(exact[name]).max() + 1.0
        assert worst(gradient, exact[name], 50 * u * largest) <= 1, name


def test_shards_and_shuffles(backend, device):
    """A part of a batch, in any order and alone, draws what it would in the whole, to the bit."""
    mu, logvar = (t.to(device) for t in make_inputs((40, 10), dtype=torch.float32))
    order = torch.randperm(40).to(device)
    noise = {"seed": 11, "backend": backend}
    whole = vaekl.reparameterize(mu, logvar, **noise)
    for part in (order, order[:7], order[3:4], order[::3]):
        z = vaekl.reparameterize(mu[part], logvar[part], sample_ids=part, **noise)
        assert torch.equal(z, whole[part])


def test_ids_in_any_layout(backend, device):
    mu, logvar = (t.to(device) for t in make_inputs((6, 4, 5), dtype=torch.float32))
    ids = torch.randperm(24).reshape(4, 6).to(device)
    noise = {"seed": 2, "backend": backend, "batch_dims": 2}
    exact = vaekl.reparameterize_kl(mu, logvar, sample_ids=ids.t().contiguous(), **noise)
    for given in (ids.t(), ids.t().contiguous().flip(0).flip(0)):
        found = vaekl.reparameterize_kl(mu, logvar, sample_ids=given, **noise)
        assert torch.equal(found.z, exact.z)
    rows = torch.arange(4, device=device).expand(6, 4)
    expanded = vaekl.reparameterize_kl(mu, logvar, sample_ids=rows, **noise)
    copied = vaekl.reparameterize_kl(mu, logvar, sample_ids=rows.contiguous(), **noise)
    assert torch.equal(expanded.z, copied.z)


def test_the_module(backend, device):
    mu, logvar = (t.to(device) for t in make_inputs((6, 5), dtype=torch.float32))
    ids = torch.tensor([4, 0, 2, 9, 1, 5], device=device)
    module = vaekl.nn.ReparameterizeKL(backend=backend)
    found = module(mu, logvar, seed=1, sample_ids=ids)
    exact = vaekl.reparameterize_kl(mu, logvar, seed=1, sample_ids=ids, backend=backend)
    assert torch.equal(found.z, exact.z)
    assert torch.equal(module.eval()(mu, logvar, seed=1, sample_ids=ids).z, mu)


@pytest.mark.parametrize("path_derivative", [False, True])
def test_log_prob(path_derivative, backend, device):
    mu, logvar = (t.to(device) for t in make_inputs((6, 5), dtype=torch.float32))
    ids = torch.tensor([4, 0, 2, 9, 1, 5], device=device)
    options = {"backend": backend, "path_derivative": path_derivative}
    found = vaekl.reparameterize_log_prob(mu, logvar, seed=1, sample_ids=ids, **options)
    zero = zeros((6, 5), torch.float32, device)
    eps = vaekl.reparameterize(zero, zero, seed=1, sample_ids=ids, backend=backend)
    exact = vaekl.reparameterize_log_prob(mu, logvar, eps=eps, **options)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b)


def roads(call, mu, ids):
    """z by the operator, and by plain operations."""
    yield torch.compile(call, backend="aot_eager", fullgraph=True)(mu, ids)
    yield torch.func.vmap(call)(mu[None], ids[None])[0]
    yield torch.func.vmap(call, in_dims=(None, 0))(mu, ids[None])[0]
    with torch.autograd.graph.save_on_cpu():
        yield call(mu, ids)


def test_roads(backend, device):
    mu, _ = make_inputs((7, 6), dtype=torch.float32)
    mu, ids = mu.to(device), ids_of((7, 6), 1, device)

    def call(mu, ids):
        return vaekl.reparameterize_kl(mu, 0.5 * mu, seed=8, sample_ids=ids, backend=backend).z

    exact = call(mu, ids)
    for z in roads(call, mu, ids):
        torch.testing.assert_close(z, exact, rtol=1e-5, atol=5e-6)


def test_ids_of_each_sample_of_vmap(backend, device):
    """Batched, they tell samples apart that one seed would give the same noise."""
    mu, _ = make_inputs((7, 6), dtype=torch.float32)
    mu, ids = mu.to(device), torch.randperm(21).reshape(3, 7).to(device)

    def call(ids):
        return vaekl.reparameterize(mu, mu, seed=8, sample_ids=ids, backend=backend)

    each = torch.func.vmap(call)(ids)
    torch.testing.assert_close(each, torch.stack([call(i) for i in ids]), rtol=1e-5, atol=5e-6)
    assert not torch.equal(each[0], each[1])


class Sampler(torch.nn.Module):
    def forward(self, mu, ids):
        return vaekl.reparameterize(mu, 0.5 * mu, seed=8, sample_ids=ids)


def test_exported(device):
    """Ids are an input of the program, whose batch may have any size."""
    mu, ids = torch.randn(7, 6, device=device), ids_of((7, 6), 1, device)
    batch = torch.export.Dim("batch", min=2)
    shapes = {"mu": {0: batch}, "ids": {0: batch}}
    program = torch.export.export(Sampler(), (mu, ids), dynamic_shapes=shapes).module()
    for n in (7, 3):
        exact = Sampler()(mu[:n], ids[:n])
        torch.testing.assert_close(program(mu[:n], ids[:n]), exact, rtol=1e-5, atol=5e-6)


def test_gradients_on_all_roads(backend, device):
    mu, _ = make_inputs((7, 6), dtype=torch.float32)
    mu, ids = mu.to(device), ids_of((7, 6), 1, device)

    def loss(mu):
        out = vaekl.reparameterize_kl(mu, 0.5 * mu, seed=8, sample_ids=ids, backend=backend)
        return out.z.sin().sum() + out.kl

    x = mu.clone().requires_grad_()
    (exact,) = torch.autograd.grad(loss(x), x)
    (twice,) = torch.autograd.grad(loss(x), x, create_graph=True)
    assert twice.requires_grad
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (of_compiled,) = torch.autograd.grad(compiled(x), x)
    for found in (twice, of_compiled, torch.func.grad(loss)(mu)):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(mu)
    _, along = torch.func.jvp(loss, (mu,), (direction,))
    torch.testing.assert_close(along, (exact * direction).sum(), rtol=1e-4, atol=1e-4)


def test_ids_are_read_in_backward(backend, device):
    """Kept by reference: writing to them in between is an error, as of any saved tensor. (The eager
    backend has kept the noise.)
    """
    mu, logvar = (t.to(device).requires_grad_() for t in make_inputs((6, 5), dtype=torch.float32))
    ids = torch.arange(6, device=device)
    out = vaekl.reparameterize_kl(mu, logvar, seed=1, sample_ids=ids, backend=backend)
    std = torch.exp(0.5 * logvar.detach())
    drawn = (out.z.detach() - mu.detach()) / std
    ids.add_(1)
    if backend == "eager":
        out.z.sum().backward()
        torch.testing.assert_close(logvar.grad, 0.5 * std * drawn, rtol=1e-4, atol=1e-5)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.z.sum().backward()


def test_ids_of_inference_mode(backend, device):
    mu, logvar = (t.to(device).requires_grad_() for t in make_inputs((6, 5), dtype=torch.float32))
    with torch.inference_mode():
        ids = torch.arange(6, device=device)
    gradients = []
    for given in (ids, torch.arange(6, device=device)):
        out = vaekl.reparameterize_kl(mu, logvar, seed=1, sample_ids=given, backend=backend)
        gradients.append(torch.autograd.grad(out.z.square().sum(), [mu, logvar]))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


IDS = torch.arange(4)
BAD = {
    "no seed": ({"sample_ids": IDS}, ValueError, "sample_ids .* give seed"),
    "generator": (
        {"sample_ids": IDS, "generator": torch.Generator()}, ValueError, "sample_ids .* give seed",
    ),
    "eps": ({"sample_ids": IDS, "eps": 1.0}, ValueError, "sample_ids .* give seed"),
    "eps and seed": (
        {"sample_ids": IDS, "eps": 1.0, "seed": 1}, ValueError, "at most one of eps, generator",
    ),
    "shape": (
        {"sample_ids": IDS[:3], "seed": 1}, ValueError,
        r"sample_ids must have the batch shape \(4,\), of mu \(4, 6\) .*; got \(3,\)",
    ),
    "one for each element": (
        {"sample_ids": torch.zeros(4, 6, dtype=torch.int64), "seed": 1}, ValueError,
        r"sample_ids must have the batch shape .*; got \(4, 6\)",
    ),
    "dtype": (
        {"sample_ids": IDS.int(), "seed": 1}, TypeError,
        r"sample_ids must have dtype torch\.int64, got torch\.int32",
    ),
    "type": ({"sample_ids": [0], "seed": 1}, TypeError, "sample_ids must be a torch.*list"),
    "layout": (
        {"sample_ids": IDS.to_sparse(), "seed": 1}, TypeError, "sample_ids must be a dense",
    ),
    "device": (
        {"sample_ids": IDS.to("meta"), "seed": 1}, ValueError, "sample_ids must be on the device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    options, error, message = BAD[name]
    mu, moments = torch.zeros(4, 6), torch.zeros(4, 12)
    prior = (torch.zeros(6), torch.zeros(6))
    calls = [
        lambda: vaekl.reparameterize_kl(mu, mu, **options),
        lambda: vaekl.reparameterize_kl(mu, mu, prior=prior, **options),
        lambda: vaekl.reparameterize(mu, mu, **options),
        lambda: vaekl.reparameterize_log_prob(mu, mu, **options),
        lambda: vaekl.reparameterize_kl_moments(moments, **options),
        lambda: vaekl.nn.ReparameterizeKL()(mu, mu, **options),
        lambda: vaekl.nn.ReparameterizeKL().eval()(mu, mu, **options),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("shape", [(5, 4, 3, 2), (5, 2, 50, 60)])
def test_a_list_of_generators_is_one_launch(shape, auto, monkeypatch, device):
    """Where no mode looks on; a mode, and an eager backend, have a launch for each sample."""
    parameters = torch.randn(shape, device=device, requires_grad=True)
    posterior = DiagonalGaussianDistribution(parameters)
    launches, forward = [], _plans.forward
    monkeypatch.setattr(_plans, "forward", lambda *x: launches.append(x) or forward(*x))
    makers = [lambda s=s: torch.Generator(device).manual_seed(s) for s in range(5)]
    z, kl = posterior.sample_and_kl([make() for make in makers])
    assert len(launches) == (5 if auto == "eager" else 1)
    alone = [
        DiagonalGaussianDistribution(parameters[b : b + 1]).sample(make())
        for b, make in enumerate(makers)
    ]
    assert torch.equal(z, torch.cat(alone))
    upstream = torch.randn_like(z), torch.randn_like(kl)
    (found,) = torch.autograd.grad([z, kl], parameters, upstream)
    of_kl = posterior.kl()
    (exact,) = torch.autograd.grad([torch.cat(alone), of_kl], parameters, upstream)
    torch.testing.assert_close(kl, of_kl)
    torch.testing.assert_close(found, exact)


def test_a_generator_twice_in_a_list(auto, device):
    """It gives one draw after the other, as it would to two calls."""
    generator, again = (torch.Generator(device).manual_seed(4) for _ in range(2))
    posterior = DiagonalGaussianDistribution(torch.randn(2, 4, 3, device=device))
    z = posterior.sample([generator, generator])
    for b in range(2):
        one = DiagonalGaussianDistribution(posterior.parameters[b : b + 1])
        assert torch.equal(z[b : b + 1], one.sample(again))
