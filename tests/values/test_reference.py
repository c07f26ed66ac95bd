"""The oracle against formulas in their plain form: torch's autograd of them, and 50 digits."""

import itertools

import mpmath
import numpy as np
import pytest
import torch

from vaekl.reference import SCALES, SEED_OFFSET, Oracle, normal, torch_reparameterize_kl


@pytest.mark.parametrize("batch_dims", [0, 1, 2, 3])
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean", "per_dim"])
@pytest.mark.parametrize("mean_over", ["batch", "all"])
def test_plain_forms_are_the_oracle(batch_dims, reduction, mean_over):
    options = {"batch_dims": batch_dims, "reduction": reduction, "mean_over": mean_over}
    mu, logvar, eps = torch.randn(3, 2, 4, 5, dtype=torch.float64).unbind()
    z, kl, kl_of_mean = torch_reparameterize_kl(mu, logvar, eps, clamp=(-1.0, 0.5), **options)
    oracle = Oracle(mu, logvar, eps, clamp=(-1.0, 0.5), **options)
    for values, exact in ((z, oracle.z), (kl, oracle.kl), (kl_of_mean, oracle.kl_of_mean)):
        assert values.shape == exact.shape
        torch.testing.assert_close(values, torch.as_tensor(exact), rtol=1e-12, atol=1e-14)


EXACT_LOGVAR = {
    "logvar": lambda s: s,
    "log_std": lambda s: 2 * s,
    "std": lambda s: 2 * mpmath.log(s),
    "var": mpmath.log,
}


def exact_kl(scale, m, s, prior_m, prior_s):
    """Of one element, in 50 digits."""
    with mpmath.workdps(50):
        m, s, prior_m, prior_s = map(mpmath.mpf, (m, s, prior_m, prior_s))
        prior_logvar = EXACT_LOGVAR[scale](prior_s)
        r = EXACT_LOGVAR[scale](s) - prior_logvar
        square = (m - prior_m) ** 2 * mpmath.exp(-prior_logvar)
        return float((square + mpmath.exp(r) - 1 - r) / 2)


def scale_of(name, logvar):
    """The scale in a form."""
    return {"logvar": logvar, "log_std": logvar / 2, "std": np.exp(logvar / 2),
            "var": np.exp(logvar)}[name]  # fmt: skip


DISTANCES = [sign * 10.0**k for k in (-4, -3, -2, -1, -0.4, 0, 1) for sign in (-1, 1)]


@pytest.mark.parametrize("prior_logvar", [-10.0, -0.7, 0.0, 2.3, 10.0])
@pytest.mark.parametrize("scale", list(SCALES))
def test_exact_at_every_distance_from_the_prior(scale, prior_logvar):
    """In float64 today's formulas have lost half of their digits at 1e-4."""
    pairs = list(itertools.product(DISTANCES, [0.0, *DISTANCES[::2]]))
    r, d = (np.array(values) for values in zip(*pairs))
    prior_m, prior_s = 0.3, scale_of(scale, prior_logvar)
    mu, values = prior_m + d, scale_of(scale, prior_logvar + r)
    oracle = Oracle(mu[:, None], values[:, None], reduction="none", scale=scale,
                    prior=(prior_m, prior_s))  # fmt: skip
    exact = [exact_kl(scale, m, s, prior_m, prior_s) for m, s in zip(mu, values)]
    np.testing.assert_allclose(oracle.kl, exact, rtol=2e-15)


EXACT_STD = {
    "logvar": lambda s: mpmath.exp(s / 2),
    "log_std": mpmath.exp,
    "std": lambda s: s,
    "var": mpmath.sqrt,
}


@pytest.mark.parametrize("clamp", [None, (-0.5, 0.7)])
@pytest.mark.parametrize("scale", list(SCALES))
def test_z_is_rounded_once(scale, clamp):
    """Whoever is held to a unit of the last place is not held to the oracle's own roundings."""
    mu, logvar, eps = np.random.default_rng(4).normal(size=(3, 200, 1)) * 3
    values = scale_of(scale, logvar)
    z = Oracle(mu, values, eps, scale=scale, clamp=clamp).z
    lo, hi = clamp or (-np.inf, np.inf)
    for m, s, e, found in zip(*(t.flatten() for t in (mu, values, eps, z))):
        with mpmath.workdps(50):
            s, logvar = mpmath.mpf(s), EXACT_LOGVAR[scale](mpmath.mpf(s))
            within = max(lo, min(hi, logvar))
            std = EXACT_STD[scale](s) if within == logvar else mpmath.exp(within / 2)
            exact = mpmath.mpf(m) + std * mpmath.mpf(e)
            assert abs(found - exact) <= 0.501 * np.spacing(abs(found))


@pytest.mark.parametrize("scale", list(SCALES))
def test_no_prior_is_the_standard_one(scale):
    mu, logvar = np.random.default_rng(3).normal(size=(2, 5, 4))
    values = scale_of(scale, logvar)
    one = {"logvar": 0.0, "log_std": 0.0, "std": 1.0, "var": 1.0}[scale]
    for mean_over in ("batch", "all"):
        options = {"scale": scale, "mean_over": mean_over}
        plain, given = Oracle(mu, values, **options), Oracle(mu, values, prior=(0, one), **options)
        assert plain.kl == given.kl
        assert plain.kl_of_mean == given.kl_of_mean
        of_logvar = Oracle(mu, logvar, mean_over=mean_over)
        np.testing.assert_allclose(plain.kl, of_logvar.kl, rtol=1e-13)
        np.testing.assert_allclose(plain.kl_of_mean, of_logvar.kl_of_mean, rtol=1e-13)


@pytest.mark.parametrize("scale", ["std", "var"])
def test_scales_without_a_logarithm(scale):
    """Their KL is what torch gives: of 0 it is inf, else NaN; z takes a std of 0 as it is."""
    values = np.array([[0.0, -1.0, np.inf, np.nan]])
    kl = Oracle(np.zeros((1, 4)), values, scale=scale, reduction="per_dim").kl
    np.testing.assert_array_equal(kl, [np.inf, np.nan, np.nan, np.nan])
    oracle = Oracle(np.ones((1, 4)), values, np.full((1, 4), 2.0), scale="std")
    np.testing.assert_array_equal(oracle.z, [[1.0, -1.0, np.inf, np.nan]])
    np.testing.assert_array_equal(oracle.gradients(dz=np.ones((1, 4)))["dlogvar"][0, :2], 2.0)


def plain(mu, values, eps, prior, scale, clamp, batch_dims, mean_over, path):
    """By reduction, kl; and kl_of_mean, z, log_q, log_p, by torch.distributions."""
    to_logvar = {"logvar": lambda s: s, "log_std": lambda s: 2 * s, "std": lambda s: 2 * s.log(),
                 "var": torch.log}[scale]  # fmt: skip
    logvar = to_logvar(values)
    logvar = logvar if clamp is None else logvar.clamp(*clamp)

    def gaussian(m, v):
        return torch.distributions.Normal(m, (0.5 * v).exp())

    prior_m, prior_v = prior[0], to_logvar(prior[1])
    q, p = gaussian(mu, logvar), gaussian(prior_m, prior_v)
    elements = torch.distributions.kl_divergence(q, p)
    rows = elements.flatten(batch_dims).sum(-1)
    batch = rows.numel()
    kl = {"none": rows, "sum": rows.sum(), "batchmean": rows.mean(), "mean": elements.mean(),
          "per_dim": elements.flatten(0, batch_dims - 1).sum(0) / batch}  # fmt: skip
    axes = tuple(range(batch_dims)) if mean_over == "batch" else tuple(range(mu.dim()))
    of_mean = torch.distributions.kl_divergence(gaussian(mu.mean(axes), logvar.mean(axes)), p).sum()
    z = mu + (0.5 * logvar).exp() * eps
    held = gaussian(mu.detach(), logvar.detach()) if path else q
    log_q, log_p = (n.log_prob(z).flatten(batch_dims).sum(-1) for n in (held, p))
    return kl, of_mean, z, log_q, log_p


PRIORS = {"numbers": ((), ()), "event": ((3, 2), (1, 2)), "all": ((1, 4, 3, 2), (5, 4, 3, 2)),
          "samples": ((5, 4, 1, 1), ())}  # fmt: skip


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean", "per_dim"])
@pytest.mark.parametrize("shapes", list(PRIORS))
@pytest.mark.parametrize("scale", list(SCALES))
@pytest.mark.parametrize(("clamp", "path"), [(None, False), ((-0.4, 0.6), True)])
def test_values_and_gradients_are_autograds(scale, shapes, reduction, clamp, path):
    batched = shapes in ("all", "samples")
    mean_over = "all" if shapes == "numbers" else "batch"
    mu, logvar, eps = torch.randn(3, 5, 4, 3, 2, dtype=torch.float64).unbind()
    prior = [torch.randn(shape, dtype=torch.float64) for shape in PRIORS[shapes]]
    values, prior[1] = (torch.tensor(scale_of(scale, v.numpy())) for v in (logvar, prior[1]))
    leaves = [t.requires_grad_() for t in (mu, values, eps, *prior)]
    kls, *others = plain(mu, values, eps, prior, scale, clamp, 2, mean_over, path)
    outputs = [kls[reduction], *others]
    upstream = [torch.randn_like(output) for output in outputs]
    oracle = Oracle(mu, values, eps, reduction=reduction, mean_over=mean_over, batch_dims=2,
                    clamp=clamp, scale=scale, prior=tuple(prior), path_derivative=path)  # fmt: skip
    names = ["kl", "kl_of_mean", "z", "log_q", "log_p"]
    if batched:
        with pytest.raises(ValueError, match="without batch axes"):
            _ = oracle.kl_of_mean
        del outputs[1], upstream[1], names[1]
    for name, output in zip(names, outputs):
        exact = torch.as_tensor(getattr(oracle, name))
        assert exact.shape == output.shape
        torch.testing.assert_close(output.detach(), exact, rtol=1e-12, atol=1e-13)
    expected = torch.autograd.grad(outputs, leaves, upstream)
    found = oracle.gradients(**{f"d{name}": g for name, g in zip(names, upstream)})
    order = ["dmu", "dlogvar", "deps", "dprior_mean", "dprior_scale"]
    for name, gradient in zip(order, expected, strict=True):
        assert found[name].shape == gradient.shape
        torch.testing.assert_close(torch.tensor(found[name]), gradient, rtol=1e-11, atol=1e-12)


def test_noise_of_samples():
    """Of a shard, of samples in any order, and of indices past 2^32."""
    whole = normal(9, SEED_OFFSET, 12, 6)
    ids = np.array([[7, 0, 11], [3, 3, 5]])
    np.testing.assert_array_equal(normal(9, SEED_OFFSET, 6, 6, ids), whole[ids.reshape(-1)])
    far = 2**40 + 3
    groups = -(-6 // 4)
    of_group = normal(9, SEED_OFFSET, 1, 4, [far * groups])
    np.testing.assert_array_equal(normal(9, SEED_OFFSET, 1, 6, [far])[:, :4], of_group)
