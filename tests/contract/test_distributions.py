"""vaekl.distributions against the oracle; tests/peers compares it with diffusers' own class."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import vaekl
from vaekl.distributions import DiagonalGaussianDistribution
from vaekl.reference import kl_between, moments_gradient, moments_oracle, nll
from vaekl.testing import KL_BUDGET, gradient_bounds, make_inputs, worst

SHAPES = [(3, 8), (3, 4, 5), (2, 4, 3, 2), (2, 4, 2, 3, 2)]


def make(shape, *, dtype=torch.float32, device="cpu", scale=1.0, seed=0, deterministic=False):
    moments = make_inputs(shape, dtype=dtype, device=device, scale=scale, seed=seed)[0]
    return DiagonalGaussianDistribution(moments.requires_grad_(), deterministic)


@pytest.mark.parametrize("shape", SHAPES)
def test_attributes(shape, device):
    posterior = make(shape, device=device, scale=20.0)
    mean, logvar = posterior.parameters.chunk(2, 1)
    logvar = logvar.clamp(-30.0, 20.0)
    assert not torch.equal(logvar, posterior.parameters.chunk(2, 1)[1])
    assert torch.equal(posterior.mean, mean)
    assert torch.equal(posterior.mode(), mean)
    assert torch.equal(posterior.logvar, logvar)
    assert torch.equal(posterior.std, torch.exp(0.5 * logvar))
    assert torch.equal(posterior.var, torch.exp(logvar))
    assert posterior.deterministic is False


def test_deterministic(device):
    posterior = make((2, 4, 3, 3), device=device, deterministic=True)
    zero = torch.zeros_like(posterior.mean)
    assert torch.equal(posterior.std, zero)
    assert torch.equal(posterior.var, zero)
    assert torch.equal(posterior.sample(), posterior.mean)
    assert posterior.sample().data_ptr() != posterior.mean.data_ptr()
    none = torch.zeros(1, device=device)
    other = make((2, 4, 3, 3), device=device)
    for value in (posterior.kl(), posterior.kl(other), posterior.nll(zero)):
        assert torch.equal(value, none)
    z, kl = posterior.sample_and_kl()
    assert torch.equal(z, posterior.mean)
    assert torch.equal(kl, none)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_sums_over_all_event_axes(shape, dtype, auto, device):
    posterior = make(shape, dtype=dtype, device=device, scale=20.0)
    assert posterior.logvar.max() == 20  # some are clamped
    kl = posterior.kl()
    oracle = moments_oracle(posterior.parameters, reduction="none", clamp=(-30.0, 20.0))
    assert kl.shape == shape[:1]
    assert kl.dtype == torch.float32
    assert worst(kl, oracle.kl, KL_BUDGET[torch.float32] * oracle.kl) <= 1
    upstream = torch.randn_like(kl)
    kl.backward(upstream)
    bounds = moments_gradient(gradient_bounds(oracle, torch.float32, dtype, None, upstream))
    expected = moments_gradient(oracle.gradients(None, upstream))
    assert worst(posterior.parameters.grad, expected, bounds) <= 1


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((2, 4, 2, 3, 5), [1, 2, 3]),
        ((2, 4, 2, 3, 5), (-1, 2)),
        ((2, 4, 3, 2), [1]),
        ((2, 4, 3, 2), 3),
        ((2, 4, 3, 2), [0, 1, 2, 3]),
        ((2, 4, 3, 2), []),
    ],
)
@pytest.mark.parametrize("with_other", [False, True])
def test_dims(shape, dims, with_other, auto, device):
    """As torch.sum takes them: the peers' [1, 2, 3] leave [B, W] of a video."""
    posterior, other = make(shape, device=device), make(shape, device=device, seed=3)
    pair = (posterior.mean, posterior.logvar)
    theirs = (other.mean, other.logvar) if with_other else (torch.zeros(()), torch.zeros(()))
    exact = torch.from_numpy(kl_between(*pair, *theirs)).sum(dims)
    kl = posterior.kl(other, dims) if with_other else posterior.kl(dims=dims)
    assert kl.shape == exact.shape
    torch.testing.assert_close(kl.detach().cpu().double(), exact, rtol=5e-6, atol=1e-6)
    x = torch.randn_like(posterior.mean)
    density = torch.from_numpy(nll(x, *pair)).sum(dims)
    result = posterior.nll(x, dims).detach()
    torch.testing.assert_close(result.cpu().double(), density, rtol=5e-6, atol=1e-5)
    if len(shape) == 5 and dims == [1, 2, 3]:
        assert kl.shape == (2, 5)


@pytest.mark.parametrize("apart", [1.0, 1e-3])
def test_kl_to_another(apart, auto, device):
    """Also where the two nearly agree, and plain formulas lose every digit."""
    posterior = make((3, 8, 4), device=device)
    moved = posterior.parameters.detach() + apart * torch.randn(3, 8, 4, device=device)
    other = DiagonalGaussianDistribution(moved.requires_grad_())
    exact = kl_between(posterior.mean, posterior.logvar, other.mean, other.logvar).sum((1, 2))
    assert worst(posterior.kl(other), exact, 2e-6 * exact) <= 1
    assert worst(posterior.kl(posterior), np.zeros(3), np.full(3, 1e-12)) <= 1


def test_gradients_to_another_and_of_nll(auto, device):
    """By gradcheck in float64, to both parameters; clamped logvars stand still."""
    parameters, others = (
        make_inputs((2, 4, 2), dtype=torch.float64, device=device, seed=s)[0] for s in (0, 1)
    )
    parameters[0, 2:] = 25.0
    tensors = (parameters.requires_grad_(), others.requires_grad_())
    x = torch.randn(2, 2, 2, dtype=torch.float64, device=device, requires_grad=True)

    def function(p, q, x):
        posterior = DiagonalGaussianDistribution(p)
        kl = posterior.kl(DiagonalGaussianDistribution(q))
        return kl[1:], posterior.nll(x), posterior.kl(dims=[1])[1:]

    assert torch.autograd.gradcheck(function, (*tensors, x), fast_mode=True, atol=1e-6)
    function(*tensors, x)[1].sum().backward()
    assert parameters.grad[0, 2:].abs().max() == 0
    assert parameters.grad[1, 2:].abs().min() > 0


def test_samples_are_of_the_class(auto, device):
    """mean + std eps with the noise that vaekl draws from the same generator."""
    posterior = make((2, 4, 3, 2), device=device, scale=20.0)
    assert posterior.logvar.max() == 20  # some are clamped
    ones = torch.cat([torch.zeros(2, 2, 3, 2), torch.zeros(2, 2, 3, 2)], 1).to(device)
    draws = []
    for distribution in (posterior, DiagonalGaussianDistribution(ones)):
        draws.append(distribution.sample(torch.Generator(device).manual_seed(5)))
    torch.testing.assert_close(
        draws[0], posterior.mean + posterior.std * draws[1], rtol=1e-5, atol=1e-6
    )
    assert draws[0].dtype == torch.float32
    torch.manual_seed(1)
    first = posterior.sample()
    torch.manual_seed(1)
    assert torch.equal(posterior.sample(), first)
    assert not torch.equal(posterior.sample(), first)


def test_a_generator_for_each_sample(auto, device):
    """Sample b is what a batch of it alone gets, as with diffusers' lists."""
    posterior = make((3, 4, 2, 2), device=device)
    seeds = (7, 8, 9)
    makers = [lambda s=s: torch.Generator(device).manual_seed(s) for s in seeds]
    z, kl = posterior.sample_and_kl([g() for g in makers])
    assert torch.equal(z, posterior.sample([g() for g in makers]))
    torch.testing.assert_close(kl, posterior.kl())
    for b, generator in enumerate(makers):
        one = DiagonalGaussianDistribution(posterior.parameters[b : b + 1])
        assert torch.equal(z[b : b + 1], one.sample(generator()))
        assert torch.equal(one.sample([generator()]), one.sample(generator()))
    z.sum().backward()
    assert posterior.parameters.grad.isfinite().all()
    alone = posterior.sample([makers[0]()])
    assert torch.equal(alone, posterior.sample(makers[0]()))


def test_sample_and_kl_is_one_launch(auto, operators, device):
    posterior = make((2, 4, 3, 2), device=device, scale=8.0)
    make_generator = lambda: torch.Generator(device).manual_seed(5)  # noqa: E731
    z, kl = posterior.sample_and_kl(make_generator())
    assert torch.equal(z, posterior.sample(make_generator()))
    assert torch.equal(kl, posterior.kl())
    with operators:
        outputs = posterior.sample_and_kl()
        torch.autograd.grad(outputs, posterior.parameters, [torch.randn_like(o) for o in outputs])
    assert [name for name in operators.names if name.startswith("vaekl")] == [
        "vaekl.reparameterize_kl.default",
        "vaekl.reparameterize_kl_backward.default",
    ]


def test_half_precision_kl_does_not_overflow(device):
    parameters = torch.full((1, 8, 64, 64), 4.0, dtype=torch.float16, device=device)
    kl = DiagonalGaussianDistribution(parameters).kl()
    exact = 4 * 64 * 64 * 0.5 * (16 + math.exp(4) - 5)
    assert exact > torch.finfo(torch.float16).max
    assert kl.item() == pytest.approx(exact, rel=1e-6)


def test_a_cpu_generator_serves_other_devices():
    """As in diffusers; on CUDA tests/gpu/test_gpu.py looks at the noise."""
    posterior = DiagonalGaussianDistribution(torch.empty(2, 4, 3, device="meta"))
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert posterior.sample(generator).shape == (2, 2, 3)
    assert not torch.equal(generator.get_state(), before)


GOOD = torch.zeros(2, 4, 3, 3)
BAD_CALLS = {
    "odd": (lambda d: type(d)(GOOD[:, :3]), ValueError, "parameters must have an even size"),
    "one axis": (lambda d: type(d)(GOOD[0, 0, 0]), ValueError, r"have an axis 1.*shape \(3,\)"),
    "no tensor": (lambda d: type(d)([1.0]), TypeError, r"parameters must be a torch\.Tensor"),
    "generators": (
        lambda d: d.sample([torch.Generator()] * 3), ValueError,
        "generator must be .* one per sample, 2; got a list of 3",
    ),
    "no generators": (lambda d: d.sample([]), ValueError, "got a list of 0"),
    "generator type": (lambda d: d.sample(5), TypeError, r"generator must be a torch\.Generator"),
    "dims high": (lambda d: d.kl(dims=[4]), ValueError, r"dims must be axes .*2, 2, 3, 3\); got"),
    "dims twice": (lambda d: d.kl(dims=[1, -3]), ValueError, "dims must name each axis once"),
    "dims type": (lambda d: d.nll(d.mean, [1.0]), ValueError, "dims must be axes"),
    "sample": (lambda d: d.nll(GOOD), ValueError, r"sample must have the shape of mean"),
    "sample type": (lambda d: d.nll(1.0), TypeError, r"sample must be a torch\.Tensor, got float"),
    "other type": (lambda d: d.kl("prior"), TypeError, "must have .*mean and logvar, got str"),
    "other": (lambda d: d.kl(type(d)(GOOD[:1])), ValueError, r"other\.mean must have the shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD_CALLS))
def test_bad_input(case):
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call(DiagonalGaussianDistribution(GOOD))


def test_patch_without_diffusers_says_what_to_install():
    code = (
        "import sys, vaekl\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'diffusers': raise ModuleNotFoundError('no', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "try: vaekl.patch_diffusers()\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "patch_diffusers needs diffusers: pip install diffusers"


def test_public():
    assert vaekl.distributions.DiagonalGaussianDistribution is DiagonalGaussianDistribution


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("apart", [1.0, 1e-2])
def test_half_precision_to_another_keeps_its_digits(dtype, apart, auto, device):
    """No number in between is rounded to half precision, the other's std included."""
    posterior = make((3, 8, 4), dtype=dtype, device=device)
    moved = posterior.parameters.detach().float() + apart * torch.randn(3, 8, 4, device=device)
    other = DiagonalGaussianDistribution(moved.to(dtype).requires_grad_())
    exact = kl_between(posterior.mean, posterior.logvar, other.mean, other.logvar).sum((1, 2))
    assert worst(posterior.kl(other), exact, 2e-6 * exact) <= 1
    x = posterior.mean.detach() + 1
    exact = nll(x, posterior.mean, posterior.logvar).sum((1, 2))
    assert worst(posterior.nll(x), exact, 2e-6 * np.abs(exact)) <= 1


def test_kl_to_a_deterministic_other(auto, device):
    """inf, for a posterior that has any width; NaN at the other's own mean, as in diffusers."""
    posterior = make((2, 4, 3), device=device)
    moved = (posterior.parameters + 1).detach()
    assert posterior.kl(DiagonalGaussianDistribution(moved, True)).tolist() == [math.inf] * 2
    same = DiagonalGaussianDistribution(posterior.parameters.detach(), True)
    assert posterior.kl(same).isnan().all()


def test_axes_of_numpy_and_the_bounds_of_logvar(device):
    """NumPy's integers as dims; no gradient at the bounds, by kl, nll and logvar alike."""
    moments = torch.zeros(2, 2, 3, 3, device=device)
    moments[:, 1, 0] = torch.tensor([-30.0, 20.0, 1.0])
    posterior = vaekl.distributions.DiagonalGaussianDistribution(moments)
    for given, dims in ((np.int64(1), 1), ((np.int64(2), 1), (1, 2)), (np.array([1, 3]), (1, 3))):
        assert torch.equal(posterior.kl(dims=given), posterior.kl(dims=dims))
    for result in (
        lambda p: p.kl(),
        lambda p: p.kl(dims=(2, 1)),
        lambda p: p.nll(torch.ones(2, 1, 3, 3, device=device)),
        lambda p: p.logvar,
    ):
        leaf = moments.clone().requires_grad_()
        result(vaekl.distributions.DiagonalGaussianDistribution(leaf)).sum().backward()
        assert leaf.grad[:, 1, 0, :2].eq(0).all()
        assert leaf.grad[:, 1, 0, 2].ne(0).all()
