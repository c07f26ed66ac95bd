"""reparameterize_log_prob: values and gradients against the oracle."""

import math

import numpy as np
import pytest
import torch

import vaekl
from steps import scale_of
from vaekl.reference import SCALES, Oracle
from vaekl.testing import make_inputs, step, unit, worst

PRIORS = {None: None, "sample": (7, 4, 5), "event": (4, 5), "number": ()}
NAMES = ("dmu", "dlogvar", "deps", "dprior_mean", "dprior_scale")


def inputs(kind, scale, dtype, device):
    """mu, scale, eps, and a prior's mean and scale."""
    mu, logvar = make_inputs((7, 4, 5), dtype=torch.float64)
    eps = torch.randn(7, 4, 5, dtype=torch.float64)
    given = [mu, scale_of(scale, logvar), eps]
    if kind is not None:
        mean, of_prior = make_inputs(PRIORS[kind], dtype=torch.float64, seed=1)
        given += [mean, scale_of(scale, of_prior)]
    return [t.to(device, dtype) for t in given]


def sizes(oracle, prior):
    """Sums of |terms| of each sample's log q and log p, which rounding is in proportion to."""
    rows = lambda t: np.broadcast_to(t, oracle.mu.shape).reshape(7, -1).sum(1)  # noqa: E731
    form = SCALES[oracle.scale]
    of_mean, of_prior = (np.float64(0), form.one) if prior is None else prior
    logvar = form.logvar(np.asarray(of_prior, np.float64))
    # A distance is as good as what it is taken from.
    reach = (np.abs(oracle.z) + np.abs(oracle.mu) + np.abs(of_mean)) * np.exp(-0.5 * logvar)
    of_q = rows(2 + np.abs(oracle.posterior_logvar) + oracle.eps**2)
    return of_q, rows(2 + np.abs(logvar) + reach**2)


@pytest.mark.parametrize("path_derivative", [False, True])
@pytest.mark.parametrize("clamp", [None, (-0.5, 0.7)])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", PRIORS)
def test_values_and_gradients(kind, scale, clamp, path_derivative, backend, device):
    dtype = torch.float32
    given = inputs(kind, scale, dtype, device)
    options = {"scale": scale, "clamp": clamp, "path_derivative": path_derivative}

    def call(mu, logvar, eps, *prior):
        return vaekl.reparameterize_log_prob(
            mu, logvar, eps=eps, prior=prior or None, backend=backend, **options
        )

    out, upstream, gradients = step(call, given)
    prior = [t.double().cpu().numpy() for t in given[3:]] or None
    oracle = Oracle(*given[:3], prior=prior, **options)
    u = 4 * unit(dtype)
    of_q, of_p = sizes(oracle, prior)
    assert out.log_q.shape == out.log_p.shape == (7,)
    assert out.log_q.dtype == out.log_p.dtype == dtype
    assert worst(out.z, oracle.z, u * (np.abs(oracle.mu) + np.abs(oracle.z))) <= 1
    assert worst(out.log_q, oracle.log_q, u * of_q) <= 1
    assert worst(out.log_p, oracle.log_p, u * of_p) <= 1
    exact = oracle.gradients(dz=upstream[0], dlog_q=upstream[1], dlog_p=upstream[2])
    for name, gradient, value in zip(NAMES, gradients, given, strict=False):
        if name == "deps" and path_derivative:
            continue  # the oracle's is of noise that is held
        largest = np.abs(exact[name]).max() + 1.0
        assert gradient.shape == value.shape
        assert worst(gradient, exact[name], 50 * u * largest) <= 1, name


@pytest.mark.parametrize("path_derivative", [False, True])
@pytest.mark.parametrize("kind", [None, "event"])
@pytest.mark.parametrize("scale", SCALES)
def test_gradcheck(scale, kind, path_derivative, backend, device):
    """Of what is not held: all by total derivatives, log p of either."""
    given = [t.requires_grad_() for t in inputs(kind, scale, torch.float64, device)]

    def call(mu, logvar, eps, *prior):
        out = vaekl.reparameterize_log_prob(
            mu, logvar, eps=eps, prior=prior or None, scale=scale, backend=backend,
            path_derivative=path_derivative,
        )  # fmt: skip
        return (out.z, out.log_p) if path_derivative else tuple(out)

    assert torch.autograd.gradcheck(call, given, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, given, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_keeps_the_density_of_the_noise(dtype, backend, device):
    """Where z has all but no digit of it."""
    mu, logvar = torch.full((2, 500, 10), 5.0).to(device, dtype).unbind()
    logvar = torch.full_like(logvar, -10.0)
    out = vaekl.reparameterize_log_prob(mu, logvar, seed=1, backend=backend)
    plain = vaekl.reparameterize_kl(mu, logvar, seed=1, backend=backend)
    torch.testing.assert_close(out.z, plain.z, rtol=2 * unit(dtype), atol=0)
    wide = vaekl.reparameterize(torch.zeros_like(mu).float(), 0.0, seed=1, backend=backend)
    expected = Oracle(mu, logvar, wide).log_q
    assert worst(out.log_q, expected, 1e-5 * np.abs(expected)) <= 1


@pytest.mark.parametrize("source", ["seed", "generator", "torch"])
def test_z_is_that_of_reparameterize_kl(source, backend, device):
    mu, logvar = make_inputs((3, 9, 10), device=device)

    def noise():
        torch.manual_seed(5)
        generator = torch.Generator(device).manual_seed(5)
        return {"seed": {"seed": 5}, "generator": {"generator": generator}, "torch": {}}[source]

    options = {"batch_dims": 2, "backend": backend}
    out = vaekl.reparameterize_log_prob(mu, logvar, **options, **noise())
    plain = vaekl.reparameterize_kl(mu, logvar, kl_of_mean=False, **options, **noise())
    torch.testing.assert_close(out.z, plain.z, rtol=0, atol=0)
    assert out.log_q.shape == (3, 9)


def test_the_mean_of_many_draws_is_the_kl(device):
    mu, logvar = make_inputs((1, 5), device=device, dtype=torch.float64)
    prior = torch.full((5,), 0.3, device=device).double(), torch.full((5,), 0.5, device=device)
    draws = [t.expand(20000, 5) for t in (mu, logvar)]
    _, log_q, log_p = vaekl.reparameterize_log_prob(*draws, prior=prior, seed=2)
    estimates = log_q - log_p
    kl = vaekl.kl_loss(mu, logvar, prior=prior)
    assert abs(estimates.mean() - kl) < 4 * estimates.std() / math.sqrt(20000)


def test_the_gradient_along_the_path_is_0_at_the_true_posterior(device):
    """Roeder et al. 2017: of log q - log p where q is p."""
    mu, logvar = (t.requires_grad_() for t in make_inputs((6, 5), device=device))
    prior = mu.detach(), logvar.detach()
    for held, zero in ((True, True), (False, False)):
        _, log_q, log_p = vaekl.reparameterize_log_prob(
            mu, logvar, prior=prior, seed=1, path_derivative=held
        )
        gradients = torch.autograd.grad((log_q - log_p).sum(), [mu, logvar])
        small = [bool((g.abs() < 1e-5).all()) for g in gradients]
        assert all(small) == zero


def test_transforms_and_programs(device):
    mu, logvar = make_inputs((6, 5), device=device)
    loss = lambda m, v: torch.stack(vaekl.reparameterize_log_prob(m, v, seed=3)[1:])  # noqa: E731
    expected = loss(mu, logvar)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(mu, logvar), expected)
    eps = torch.randn_like(mu)

    def given(m, v, e):
        out = vaekl.reparameterize_log_prob(m, v, eps=e, batch_dims=0)
        return torch.stack(out[1:])

    each = torch.func.vmap(given, out_dims=1)(mu, logvar, eps)
    whole = torch.stack(vaekl.reparameterize_log_prob(mu, logvar, eps=eps)[1:])
    torch.testing.assert_close(each, whole)


def test_smaller_and_empty_tensors(device):
    mu = make_inputs((6, 5), device=device)[0]
    one = torch.zeros(5, device=device, requires_grad=True)
    out = vaekl.reparameterize_log_prob(mu, one, eps=0.5, prior=(0, 0))
    (gradient,) = torch.autograd.grad(out.log_q.sum(), one)
    assert torch.equal(gradient, torch.full_like(one, -3.0))
    for shape, batch in (((0, 5), (0,)), ((4, 0), (4,))):
        empty = torch.zeros(shape, device=device)
        out = vaekl.reparameterize_log_prob(empty, empty)
        assert out.log_q.shape == out.log_p.shape == batch
        assert not out.log_q.any()
    each = vaekl.reparameterize_log_prob(mu, one.detach(), batch_dims=2, seed=1)
    assert each.log_q.shape == each.log_p.shape == mu.shape


def test_bad_input():
    good, call = torch.zeros(4, 3), vaekl.reparameterize_log_prob
    with pytest.raises(TypeError, match=r"mu must be a torch\.Tensor, got list"):
        call([0.0], good)
    with pytest.raises(TypeError, match="path_derivative must be a bool"):
        call(good, good, path_derivative="yes")
    with pytest.raises(ValueError, match="scale must be one of"):
        call(good, good, scale="sigma")
    with pytest.raises(ValueError, match="the prior's mean must have the shape of mu"):
        call(good, good, prior=(good[:, :2], 0.0))
    with pytest.raises(ValueError, match="at most one of"):
        call(good, good, eps=good, seed=1)
    with pytest.raises(ValueError, match="batch_dims must be in"):
        call(good, good, batch_dims=3)
    with pytest.raises(ValueError, match="backend must be one of"):
        call(good, good, backend="gpu")
