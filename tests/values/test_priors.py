"""The KLs to a prior in place of N(0, I): values and gradients against the oracle."""

import itertools

import numpy as np
import pytest
import torch

import vaekl
from steps import check_z, compute_dtype, scale_of
from vaekl.reference import SCALES, Oracle
from vaekl.reference.arrays import unbroadcast
from vaekl.testing import (
    KL_BUDGET,
    gradient_bounds,
    kl_of_mean_bound,
    make_inputs,
    step,
    unit,
    worst,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
#: Of events (4, 5): what a prior's tensors may be, and is it one for all samples?
KINDS = {
    "sample": ((7, 4, 5), (7, 4, 5), False),
    "event": ((4, 5), (4, 5), True),
    "row": ((1, 4, 5), (1, 1, 5), True),
    "column": ((7, 1, 1), (4, 1), False),
    "number": ((), (1,), True),
}
NAMES = ("dmu", "dlogvar", "dprior_mean", "dprior_scale")


def gaussian(scale, shape, seed, size=1.0, **more):
    """A mean and scale."""
    mean, logvar = make_inputs(shape, scale=size, seed=seed, **more)
    return mean, scale_of(scale, logvar)


def prior_of(kind, scale, **more):
    of_mean, of_scale, _ = KINDS[kind]
    return gaussian(scale, of_mean, 1, **more)[0], gaussian(scale, of_scale, 2, **more)[1]


def at_bounds(oracle, dtype, dkl):
    """Absolute errors allowed in kl and dprior_scale where clamp holds the logvar of a std or var:
    that of the prior, which is a rounded logarithm then, is subtracted from the bound.
    """
    if oracle.clamp is None or oracle.scale not in ("std", "var"):
        return 0.0, 0.0
    prior_scale = oracle.prior_pair[1]
    logvar = np.log(prior_scale) * (2 if oracle.scale == "std" else 1)
    error = 2 * unit(dtype) * (np.abs(logvar) + np.abs(oracle.posterior_logvar))
    each = 0.5 * np.abs(oracle.pair.expm1) * error + error**2
    rows = each.reshape(*oracle.mu.shape[: oracle.batch_dims], -1).sum(-1)
    slope = np.abs(SCALES[oracle.scale].slope(prior_scale))
    of_scale = 0.5 * np.abs(oracle.of_elements(dkl)) * (1 + oracle.pair.expm1) * error * slope
    kl = rows if oracle.reduction == "none" else rows.mean()
    return kl, unbroadcast(of_scale, prior_scale.shape)


def check(posterior, prior, *, backend, needs=None, upstream=None, **options):
    """One step forward and back with random upstream gradients, each result within its budget."""
    options = {"reduction": "batchmean", "kl_of_mean": True, **options}

    def call(mu, scale, *prior):
        return vaekl.reparameterize_kl(mu, scale, eps=eps, prior=prior, backend=backend, **options)

    eps = make_inputs(posterior[0].shape, seed=5)[0].to(posterior[0])
    out, upstream, gradients = step(call, (*posterior, *prior), upstream, needs=needs)
    known = {name: value for name, value in options.items() if name != "kl_of_mean"}
    oracle = Oracle(*posterior, eps, prior=prior, **known)
    dtype = compute_dtype(*posterior, *prior)

    assert out.kl.dtype == dtype
    of_kl, of_scale = at_bounds(oracle, dtype, upstream[1])
    assert worst(out.kl, oracle.kl, KL_BUDGET[dtype] * oracle.kl + of_kl) <= 1
    if options["kl_of_mean"]:
        assert out.kl_of_mean.dtype == dtype
        assert worst(out.kl_of_mean, oracle.kl_of_mean, kl_of_mean_bound(oracle, dtype)) <= 1
    check_z(out.z, *posterior, eps, oracle, compute_dtype(*posterior))
    exact = oracle.gradients(*upstream)
    for name, gradient, given in zip(NAMES, gradients, (*posterior, *prior), strict=True):
        if gradient is None:
            continue
        bounds = gradient_bounds(oracle, dtype, given.dtype, *upstream)
        bounds["dprior_scale"] = bounds["dprior_scale"] + of_scale
        assert (gradient.shape, gradient.dtype) == (given.shape, given.dtype)
        assert worst(gradient, exact[name], bounds[name]) <= 1, name
    return gradients


@pytest.mark.parametrize("reduction", ["none", "batchmean", "per_dim"])
@pytest.mark.parametrize("clamp", [None, (-0.5, 0.7)])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, scale, clamp, reduction, backend, many_programs, device):
    check(gaussian(scale, (7, 4, 5), 0, device=device), prior_of(kind, scale, device=device),
          backend=backend, scale=scale, clamp=clamp, reduction=reduction,
          kl_of_mean=KINDS[kind][2])  # fmt: skip


@pytest.mark.parametrize(
    "upstream", [u for u in itertools.product((True, False), repeat=3) if any(u)]
)
@pytest.mark.parametrize("mean_over", ["batch", "all"])
def test_any_upstream(mean_over, upstream, backend, config, device):
    """Several programs along both axes, each with several blocks."""
    posterior = gaussian("logvar", (41, 21), 0, device=device)
    prior = gaussian("logvar", (21,) if mean_over == "batch" else (), 1, device=device)
    gradients = [torch.randn(s, device=device) if u else None
                 for u, s in zip(upstream, [(41, 21), (), ()])]  # fmt: skip
    needs = (True, True, *[any(upstream[1:])] * 2)  # z has no part in the prior
    check(posterior, prior, backend=backend, mean_over=mean_over, upstream=gradients, needs=needs)


@pytest.mark.parametrize("needs", [n for n in itertools.product((True, False), repeat=4) if any(n)])
@pytest.mark.parametrize("kind", ["sample", "event"])
def test_any_gradient(kind, needs, backend, device):
    posterior = gaussian("std", (7, 4, 5), 0, device=device)
    prior = prior_of(kind, "std", device=device)
    check(posterior, prior, backend=backend, scale="std", needs=needs, kl_of_mean=kind == "event")


@pytest.mark.parametrize("shape", [(300, 20), (150, 33), (401, 10), (700, 2), (3, 1500), (1, 9)])
@pytest.mark.parametrize(("scale", "reduction"), [("logvar", "per_dim"), ("std", "mean")])
@pytest.mark.parametrize("is_shared", [True, False])
def test_shapes(is_shared, scale, reduction, shape, backend, device):
    posterior = gaussian(scale, shape, 0, device=device)
    prior = gaussian(scale, shape[1:] if is_shared else shape, 1, device=device)
    check(posterior, prior, backend=backend, scale=scale, reduction=reduction, kl_of_mean=is_shared)


def test_infinity_stays_infinite(backend, device):
    """Though a block has columns without an element."""
    mu, logvar = torch.zeros(2, 700, 10, device=device)
    mu[0, 0] = torch.inf
    prior = [torch.tensor([v], device=device, requires_grad=True) for v in (0.3, 0.1)]
    options = {"prior": prior, "mean_over": "all", "backend": backend}
    loss = vaekl.kl_of_mean(mu, logvar, **options)
    assert [float(g) for g in torch.autograd.grad(loss, prior)] == [-torch.inf, -torch.inf]


def test_numbers_have_the_digits_of_the_call(backend, device):
    mu, logvar = torch.zeros(1, 1, device=device), torch.zeros(1, 1, device=device).double()
    for mean in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        kl = vaekl.kl_loss(mu, logvar, prior=(mean, 0.0), backend=backend)
        assert abs(float(kl) / 0.005 - 1) < 1e-13
    wide = torch.tensor(0.1, dtype=torch.float64)
    for batch_dims in (1, 2):  # an event without axes among them
        options = {"prior": (wide, wide), "batch_dims": batch_dims, "reduction": "none"}
        found = vaekl.kl_loss(*torch.zeros(2, *[3] * batch_dims, device=device), **options)
        assert found.dtype == torch.float32


@pytest.mark.parametrize("layout", ["halves", "transposed", "channels_last", "expanded", "steps"])
@pytest.mark.parametrize("kind", ["sample", "event", "column"])
def test_layouts(kind, layout, backend, many_programs, device):
    """Of the posterior, and of the prior, with the other contiguous."""
    posterior, prior = gaussian("logvar", (7, 4, 5), 0, device=device), prior_of(kind, "logvar")
    prior = tuple(t.to(device) for t in prior)
    moved = make_inputs((7, 4, 5), seed=3, layout=layout, device=device)
    is_shared = KINDS[kind][2]
    check(moved, prior, backend=backend, kl_of_mean=is_shared)
    if kind == "event":
        moved = tuple(t[0] for t in moved)
    check(posterior, moved, backend=backend, kl_of_mean=is_shared)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_prior", DTYPES)
def test_dtypes(of_prior, dtype, backend, device):
    check(gaussian("logvar", (5, 12), 0, dtype=dtype, device=device),
          gaussian("logvar", (12,), 1, dtype=of_prior, device=device), backend=backend)  # fmt: skip


def pairs_near_and_far(scale, dtype, device):
    """(posterior, prior), one element each: logvars, and means in units of the prior's deviation,
    from 0 to 10 apart, wherever the prior lies.
    """
    apart = [0.0, 1e-4, 1e-2, 1.0, 10.0]
    # float16 has no scale of e^10.
    logvars = apart[:-1] if dtype is torch.float16 else apart
    grid = torch.cartesian_prod(
        torch.linspace(-10, 10, 41), torch.tensor(logvars), torch.tensor(apart),
        torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 1.0]),
    ).double()  # fmt: skip
    prior_logvar, of_logvar, distance, sign, other_sign = grid.T
    logvar = prior_logvar + sign * of_logvar
    generator = torch.Generator().manual_seed(2)
    prior_mean = torch.randn(len(grid), generator=generator, dtype=torch.float64)
    mean = prior_mean + other_sign * distance * (prior_logvar / 2).exp()
    pair = [(mean, logvar), (prior_mean, prior_logvar)]
    return [tuple(t.to(device, dtype) for t in (m, scale_of(scale, v))) for m, v in pair]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_collapse_onto_a_learned_prior(scale, dtype, backend, device):
    """Each element's KL, and gradients."""
    posterior, prior = pairs_near_and_far(scale, dtype, device)
    options = {"scale": scale, "reduction": "none", "batch_dims": 1, "kl_of_mean": False}
    check(posterior, prior, backend=backend, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
def test_every_distance(scale, dtype, backend, device):
    """One element each, so that no sum hides an error; each side of every seam."""
    apart = torch.logspace(-6 if dtype is torch.float32 else -12, 1, 500, dtype=torch.float64)
    dense = torch.linspace(-3, 3, 2001, dtype=torch.float64)
    apart = torch.cat([apart, -apart, dense])
    generator = torch.Generator().manual_seed(3)
    prior_logvar = 20 * torch.rand(len(apart), generator=generator, dtype=torch.float64) - 10
    pair = [scale_of(scale, v).to(device, dtype) for v in (prior_logvar + apart, prior_logvar)]
    zero = torch.zeros_like(pair[0])
    options = {"scale": scale, "prior": (zero, pair[1]), "reduction": "none", "batch_dims": 1}
    kl = vaekl.kl_loss(zero, pair[0], backend=backend, **options)
    exact = Oracle(zero, pair[0], **options).kl
    assert worst(kl, exact, KL_BUDGET[dtype] * exact) <= 1


@pytest.mark.parametrize("scale", ["logvar", "log_std"])
@pytest.mark.parametrize("mean_over", ["batch", "all"])
def test_means_far_from_the_prior(mean_over, scale, backend, device):
    """Of one element, the mean is exact. Its logvar less the prior's is rounded, which e^10 makes
    much of.
    """
    zero = torch.zeros(1, 1, device=device)
    for logvar in torch.linspace(0, 3, 60):
        own, of_prior = (scale_of(scale, v).to(zero) for v in (logvar, logvar / 3 - 10))
        options = {"scale": scale, "prior": (0.0, of_prior), "mean_over": mean_over}
        kl = vaekl.kl_of_mean(zero, own[None, None], backend=backend, **options)
        exact = Oracle(zero, own[None, None], **options).kl_of_mean
        assert worst(kl, exact, KL_BUDGET[torch.float32] * exact) <= 1


@pytest.mark.parametrize("scale", SCALES)
def test_a_posterior_that_is_its_prior(scale, backend, device):
    """0, to the bit, and so are all gradients of the KL."""
    posterior = [t.requires_grad_() for t in gaussian(scale, (6, 10), 0, device=device)]
    prior = [t.detach().clone().requires_grad_() for t in posterior]
    kl = vaekl.kl_loss(*posterior, scale=scale, prior=prior, backend=backend)
    assert kl == 0
    for gradient in torch.autograd.grad(kl, [*posterior, *prior]):
        assert not gradient.any()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("memory", ["contiguous", "steps"])
def test_the_standard_normal_is_a_prior(memory, scale, storage, backend, device):
    """As two numbers it gives the same bits as none; as two tensors the same but for rounding."""
    mu, logvar = make_inputs((41, 20), layout=memory, device=device)
    given = storage.store(mu, scale_of(scale, logvar))
    unit = 1.0 if scale in ("std", "var") else 0.0
    number, one = (0, unit), torch.full((), unit, device=device)
    tensors = torch.zeros_like(one), one
    steps = [
        step(
            lambda *t, p=prior: storage.call(*t, scale=scale, prior=p, seed=3, backend=backend),
            given,
        )
        for prior in (None, number, tensors)
    ]
    for plain, a, b in zip(*(found.tensors for found in steps), strict=True):
        assert torch.equal(a, plain)
        torch.testing.assert_close(b, plain, rtol=2e-6, atol=1e-6)


WORST = [(0.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0), (1.0, 0.0), (1.0, np.inf)]
WORST += [(np.inf, 1.0), (np.nan, 1.0), (1.0, np.nan)]


@pytest.mark.parametrize("values", WORST)
@pytest.mark.parametrize("scale", ["std", "var"])
def test_without_a_logarithm(scale, values, backend, device):
    """A scale of 0 or less is what torch makes of its logarithm; so is a prior's."""
    posterior, prior = (torch.tensor([[value]], device=device) for value in values)
    mean = torch.zeros_like(prior)
    options = {"scale": scale, "prior": (mean, prior), "reduction": "none", "batch_dims": 2}
    found = vaekl.kl_loss(mean, posterior, backend=backend, **options)
    exact = Oracle(mean, posterior, **options).kl
    assert worst(found, exact, KL_BUDGET[torch.float32] * np.abs(exact)) <= 1
    ratio = (posterior.log() - prior.log()) * (2 if scale == "std" else 1)
    as_torch = 0.5 * (ratio.exp() - 1 - ratio)
    torch.testing.assert_close(found, as_torch.double().float(), equal_nan=True)


def test_far_pairs_do_not_overflow(backend, device):
    """exp(-logvar) of the prior alone would, in float32."""
    mu = torch.tensor([[1e-25, 0.0, 2.0]], device=device)
    logvar = torch.full((1, 3), -95.0, device=device)
    prior = torch.zeros(1, 3, device=device), torch.tensor([[-95.0, -95.0, 40.0]], device=device)
    check((mu, logvar), prior, backend=backend, kl_of_mean=False, reduction="none")
