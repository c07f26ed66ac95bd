"""vaekl.distributions.Normal: what torch's own suite demands of Normal, and KLs by the oracle."""

import copy
import math
import pickle

import numpy as np
import pytest
import scipy.stats
import torch
from torch.distributions import Independent, Laplace, TransformedDistribution, kl_divergence
from torch.distributions import Normal as TorchNormal
from torch.distributions.transforms import ExpTransform

import vaekl
from vaekl.distributions import Normal
from vaekl.reference import Oracle
from vaekl.testing import KL_BUDGET, step, worst

KINDS = [(Normal, Normal), (Normal, TorchNormal), (TorchNormal, Normal)]
SHAPES = [((), ()), ((4,), ()), ((), (4,)), ((3, 4), (4,)), ((4,), (3, 4)), ((3, 1), (2, 1, 4))]


def parameters(shape, seed=0, dtype=torch.float32, device="cpu"):
    """loc and scale."""
    generator = torch.Generator().manual_seed(seed)
    loc, log = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return [t.to(device, dtype).requires_grad_() for t in (loc, log.exp())]


def ours_and_torchs(shape, **more):
    given = parameters(shape, **more)
    return Normal(*given), TorchNormal(*given)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_all_that_does_not_sample_is_torchs(shape, device):
    ours, plain = ours_and_torchs(shape, dtype=torch.float64, device=device)
    assert repr(ours) == repr(plain)
    for name in ("batch_shape", "event_shape", "has_rsample", "support", "arg_constraints"):
        assert getattr(ours, name) == getattr(plain, name)
    for name in ("loc", "scale", "mean", "mode", "stddev", "variance"):
        assert torch.equal(getattr(ours, name), getattr(plain, name))
    assert torch.equal(ours.entropy(), plain.entropy())
    value = torch.linspace(-3, 3, 7, dtype=torch.float64, device=device)
    value = value.reshape(7, *[1] * len(shape))
    for name, given in (("log_prob", value), ("cdf", value), ("icdf", (value + 3) / 6)):
        assert torch.equal(getattr(ours, name)(given), getattr(plain, name)(given))
    assert torch.equal(ours.perplexity(), plain.perplexity())


def test_numbers_and_shapes():
    """What broadcasts, and what is added before and after."""
    assert Normal(0, 1).sample().shape == ()
    assert Normal(0.0, 1.0).sample((1,)).shape == (1,)
    assert Normal(torch.zeros(5), 1.0).batch_shape == (5,)
    assert Normal(torch.zeros(3, 1), torch.ones(4)).rsample((2,)).shape == (2, 3, 4)
    assert Normal(torch.zeros(0, 4), 1.0).rsample((2,)).shape == (2, 0, 4)
    assert Normal(0.0, 1.0).sample(torch.Size([2, 3])).dtype == torch.get_default_dtype()
    wider = Normal(torch.zeros(4), torch.ones(4)).expand((3, 4))
    assert type(wider) is Normal
    assert wider.sample((2,)).shape == (2, 3, 4)


@pytest.mark.parametrize("scale", [-1.0, 0.0, math.nan])
def test_arguments_are_checked_as_torch_does(scale):
    with pytest.raises(ValueError, match="scale"):
        Normal(torch.zeros(2), torch.full((2,), scale), validate_args=True)
    unchecked = Normal(torch.zeros(2), torch.full((2,), scale), validate_args=False)
    with pytest.raises(ValueError, match="loc"):
        Normal(math.nan, 1.0, validate_args=True)
    assert unchecked.batch_shape == (2,)
    with pytest.raises(ValueError, match="support"):
        Normal(0.0, 1.0, validate_args=True).log_prob(torch.tensor(math.nan))


def test_a_copy_is_the_same():
    normal, _ = ours_and_torchs((3,))
    plain = Normal(normal.loc.detach(), normal.scale.detach())
    for other in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert torch.equal(other.sample(seed=3), plain.sample(seed=3))


@pytest.mark.parametrize("shape", [(), (5,), (7, 20)])
def test_samples_follow_the_parameters(shape, auto, device):
    normal, _ = ours_and_torchs(shape, dtype=torch.float64, device=device)
    z = normal.rsample((2,), seed=3)
    assert z.shape == (2, *shape)
    assert torch.equal(normal.sample((2,), seed=3), z)
    assert not normal.sample((2,)).requires_grad
    upstream = torch.randn_like(z)
    d_loc, d_scale = torch.autograd.grad(z, [normal.loc, normal.scale], upstream)
    eps = (z - normal.loc) / normal.scale
    torch.testing.assert_close(d_loc, upstream.sum(0))
    torch.testing.assert_close(d_scale, (upstream * eps).sum(0))


def test_generators_and_the_global_seed(auto, device):
    normal, _ = ours_and_torchs((7, 20), device=device)
    make_generator = lambda: torch.Generator(device).manual_seed(5)  # noqa: E731
    drawn = normal.sample(generator=make_generator())
    assert torch.equal(drawn, normal.sample(generator=make_generator()))
    torch.manual_seed(1)
    first, second = normal.sample(), normal.sample()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(normal.sample(), first)


@pytest.mark.parametrize(("loc", "scale"), [(-1.0, 0.1), (0.0, 1.0), (1.0, 10.0)])
def test_samples_are_normal(loc, scale):
    values = Normal(loc, scale).sample((20000,), seed=0)
    distance = scipy.stats.kstest(values.numpy(), scipy.stats.norm(loc, scale).cdf)
    assert distance.pvalue > 0.001
    assert abs(values.mean() - loc) < 4 * scale / 20000**0.5
    assert abs(values.std() / scale - 1) < 4 / 40000**0.5


def test_the_density_is_the_slope_of_the_distribution(device):
    normal, _ = ours_and_torchs((4,), dtype=torch.float64, device=device)
    value = normal.sample((5,), seed=0).requires_grad_()
    (slope,) = torch.autograd.grad(normal.cdf(value).sum(), value)
    torch.testing.assert_close(slope.log(), normal.log_prob(value))


@pytest.mark.parametrize(("of_p", "of_q"), KINDS)
@pytest.mark.parametrize(("p_shape", "q_shape"), SHAPES)
def test_kl(p_shape, q_shape, of_p, of_q, auto, device):
    """Values of the oracle and gradients of torch's own, of whatever shapes broadcast."""
    given = [*parameters(p_shape, 0, device=device), *parameters(q_shape, 1, device=device)]
    shape = torch.broadcast_shapes(p_shape, q_shape)

    def call(p, q):
        return lambda a, b, c, d: kl_divergence(p(a, b), q(c, d))

    kl, upstream, gradients = step(call(of_p, of_q), given)
    options = {"scale": "std", "batch_dims": len(shape), "reduction": "none"}
    mu, std = (t.detach().expand(shape) for t in given[:2])
    exact = Oracle(mu, std, prior=[t.detach() for t in given[2:]], **options).kl
    assert kl.shape == shape
    assert worst(kl, exact, KL_BUDGET[torch.float32] * exact) <= 1
    wide = [t.detach().double().requires_grad_() for t in given]
    upstream = [u.double() for u in upstream]
    expected = torch.autograd.grad(call(TorchNormal, TorchNormal)(*wide), wide, upstream)
    for found, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("of_p", "of_q"), KINDS)
@pytest.mark.parametrize("summed", [1, 2])
def test_kl_of_independent_is_one_launch(summed, of_p, of_q, auto, operators, device):
    p, q = parameters((6, 4, 5), 0, device=device), parameters((4, 5), 1, device=device)
    each = kl_divergence(Normal(*p), Normal(*q))
    pair = Independent(of_p(*p), summed), Independent(of_q(*q), summed)
    with operators:
        kl = kl_divergence(*pair)
    torch.testing.assert_close(kl, each.flatten(3 - summed).sum(-1))
    assert kl.shape == (6, 4)[: 3 - summed]
    names = [name for name in operators.names if "vaekl" in name or "sum" in name]
    assert names == ["vaekl.reparameterize_kl.default"]


def test_nested_independent(device):
    p, q = (Normal(*parameters((6, 4, 5), seed, device=device)) for seed in (0, 1))
    kl = kl_divergence(Independent(Independent(p, 1), 1), Independent(q, 2))
    torch.testing.assert_close(kl, kl_divergence(p, q).sum((1, 2)))


def test_other_pairs_are_torchs(device):
    """What vaekl does not register, and what torch refuses."""
    ours, plain = ours_and_torchs((3, 4), device=device)
    other = Laplace(torch.zeros(4, device=device), torch.ones(4, device=device))
    assert torch.equal(kl_divergence(other, ours), kl_divergence(other, plain))
    torchs = [Independent(d, 1) for d in (other.expand((3, 4)), plain)]
    assert torch.equal(kl_divergence(*torchs), kl_divergence(other, plain).sum(-1))
    with pytest.raises(NotImplementedError):
        kl_divergence(Independent(ours, 1), Independent(ours, 2))
    with pytest.raises(ValueError, match=r"broadcast, got \(3, 4\) and \(5,\)"):
        kl_divergence(ours, Normal(torch.zeros(5, device=device), 1.0))
    transformed = TransformedDistribution(ours, ExpTransform())
    expected = TransformedDistribution(plain, ExpTransform())
    value = torch.rand(3, 4, device=device) + 0.1
    assert torch.equal(transformed.log_prob(value), expected.log_prob(value))
    assert transformed.rsample().requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [0.0, 1e-6, 1e-4, 1e-2])
def test_kl_keeps_its_digits_near_equality(apart, dtype, auto, device):
    loc, scale = (t.detach() for t in parameters((100,), dtype=dtype, device=device))
    p = Normal(loc, scale * (1 + apart))
    kl = kl_divergence(p, TorchNormal(loc, scale))
    options = {"scale": "std", "batch_dims": 1, "reduction": "none"}
    exact = Oracle(loc, p.scale, prior=(loc, scale), **options).kl
    assert worst(kl, exact, KL_BUDGET[dtype] * exact) <= 1


def test_kl_is_the_mean_of_the_densities(device):
    """By Gauss-Hermite quadrature, which is exact for squares."""
    p, q = (Normal(*parameters((4,), s, dtype=torch.float64, device=device)) for s in (0, 1))
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    nodes, weights = (torch.tensor(a, device=device)[:, None] for a in (nodes, weights))
    z = p.loc + p.scale * nodes
    mean = (weights * (p.log_prob(z) - q.log_prob(z))).sum(0) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(kl_divergence(p, q), mean)
    cross = -(weights * p.log_prob(z)).sum(0) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(p.entropy(), cross)


@pytest.mark.parametrize("of_numbers", ["p", "q"])
def test_numbers_are_as_the_other_is(of_numbers, auto, device):
    """A tensor without axes has no part in the dtype of results."""
    wide = torch.tensor([0.3, 1.2], dtype=torch.float64)
    number, other = Normal(*wide), Normal(*parameters((4, 3), device=device))
    p, q = (number, other) if of_numbers == "p" else (other, number)
    kl = kl_divergence(p, q)
    plain = kl_divergence(*(TorchNormal(d.loc.float(), d.scale.float()) for d in (p, q)))
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, plain)


def test_integers(device):
    loc, ones = torch.arange(4, device=device), torch.ones(4, device=device)
    p, q = Normal(loc, ones), TorchNormal(ones, ones)
    torch.testing.assert_close(kl_divergence(p, q), 0.5 * (loc - 1.0) ** 2)
    assert p.rsample().is_floating_point()
    assert torch.equal(p.rsample_and_kl(q)[1], kl_divergence(p, q))


def test_half_precision_has_a_float32_kl(auto, device):
    p, q = (Normal(*parameters((9,), s, torch.bfloat16, device)) for s in (0, 1))
    kl = kl_divergence(p, q)
    assert kl.dtype == torch.float32
    assert p.rsample().dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [Normal, TorchNormal])
@pytest.mark.parametrize("summed", [0, 1, 2])
def test_sample_and_kl_in_one_launch(summed, kind, auto, operators, device):
    given = parameters((6, 4, 5), 0, device=device), parameters((4, 5), 1, device=device)
    posterior, prior = Normal(*given[0]), Independent(kind(*given[1]), summed)
    with operators:
        outputs = posterior.rsample_and_kl(prior, seed=3)
        torch.autograd.grad(outputs, [*given[0], *given[1]], [torch.ones_like(o) for o in outputs])
    assert [name for name in operators.names if name.startswith("vaekl")] == [
        "vaekl.reparameterize_kl.default",
        "vaekl.reparameterize_kl_backward.default",
    ]
    z, kl = outputs
    torch.testing.assert_close(kl, kl_divergence(Independent(posterior, summed), prior.expand(
        (6, 4, 5)[: 3 - summed]
    )))  # fmt: skip
    if summed == 2:
        assert torch.equal(z, posterior.rsample(seed=3))
    eps = (z - posterior.loc) / posterior.scale
    assert abs(float(eps.detach().mean())) < 4 / 120**0.5


def test_sample_and_kl_of_a_wrong_prior(device):
    posterior = Normal(torch.zeros(3, 4, device=device), 1.0)
    with pytest.raises(TypeError, match="prior must be a Normal, or Independent of one; got Lapl"):
        posterior.rsample_and_kl(Laplace(0.0, 1.0))
    with pytest.raises(ValueError, match="the prior's mean"):
        posterior.rsample_and_kl(Normal(torch.zeros(5, device=device), 1.0))
    with pytest.raises(ValueError, match=r"prior has 3 event axes; batch_shape is \(3, 4\)"):
        posterior.rsample_and_kl(Independent(Normal(torch.zeros(1, 3, 4, device=device), 1.0), 3))
    with pytest.raises(TypeError, match="generator"):
        posterior.sample(generator=3)


def test_it_compiles(device):
    given = [*parameters((6, 4), 0, device=device), *parameters((4,), 1, device=device)]

    def loss(a, b, c, d):
        p, q = (Independent(Normal(*pair), 1) for pair in ((a, b), (c, d)))
        return kl_divergence(p, q).sum() + p.base_dist.rsample(seed=3).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), loss(*given))


def test_it_is_vmapped(device):
    p, q = (torch.stack([t.detach() for t in parameters((6, 4), s, device=device)]) for s in (0, 1))
    kl = torch.func.vmap(
        lambda a, b, c, d: kl_divergence(
            Normal(a, b, validate_args=False), Normal(c, d, validate_args=False)
        )
    )(*p, *q)
    torch.testing.assert_close(kl, kl_divergence(Normal(*p), Normal(*q)))


def test_reparameterize_kl_has_the_same_sample_and_kl(auto, device):
    """The road of tensors and that of distributions."""
    loc, scale = parameters((6, 4), device=device)
    normal = Normal(loc, scale)
    prior = Independent(Normal(torch.zeros(4, device=device), 1.0), 1)
    z, kl = normal.rsample_and_kl(prior, seed=3)
    options = {"scale": "std", "reduction": "none", "seed": 3}
    expected = vaekl.reparameterize_kl(loc, scale, **options)
    assert torch.equal(z, expected.z)
    torch.testing.assert_close(kl, expected.kl)
