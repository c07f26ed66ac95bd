"""diagnose and its accumulator against the float64 oracle, on every backend."""

import itertools
import math
import pickle

import mpmath
import numpy as np
import pytest
import torch

import vaekl
from steps import scale_of
from vaekl.backends import eager
from vaekl.backends import layout as geometry
from vaekl.reference import SCALES, Oracle, diagnostics, to_numpy
from vaekl.testing import make_inputs

#: Everything is summed in float64, whatever the inputs.
BUDGET = 1e-12


def check(report, mu, logvar, batch_dims=1, batches=1, **to_prior):
    """Every number of a report."""
    expected = diagnostics(mu, logvar, batch_dims, **to_prior)
    largest = float(np.abs(to_numpy(mu)).max())
    distance = expected["mean_mu"]
    if to_prior.get("prior") is not None:  # which all means are far from
        of_mean, of_scale = (to_numpy(t).ravel() for t in to_prior["prior"])
        distance = (distance - of_mean) * np.exp(-0.5 * SCALES[to_prior["scale"]].logvar(of_scale))
        largest += np.abs(SCALES[to_prior["scale"]].logvar(of_scale)).max()
    around_mean = expected["kl_dims"] - 0.5 * distance**2
    for name, value in expected.items():
        found = to_numpy(getattr(report, name))
        # Means are as good as the size of what they are of, parts of a KL as good as the KL.
        slack = around_mean if name in ("information_dims", "var_mu") else expected["kl_dims"]
        slack = largest if "mean" in name else slack
        if batches > 1:  # distances of means, each rounded
            slack = slack + largest
        bound = BUDGET * np.abs(value) + 4e-15 * slack
        assert (np.abs(found.ravel() - value) <= bound).all(), name
    batch = math.prod(mu.shape[:batch_dims])
    assert report.samples == batch
    assert report.kl_dims.shape == mu.shape[batch_dims:]
    assert report.dimensions == mu.numel() // batch
    for total, dims in (("kl", "kl_dims"), ("kl_of_mean", "kl_of_mean_dims"),
                        ("aggregate_kl", "aggregate_kl_dims"),
                        ("information", "information_dims"),
                        ("nonfinite", "nonfinite_mu_dims"),
                        ("logvar_outside", "logvar_outside_dims")):  # fmt: skip
        assert getattr(report, total) == pytest.approx(to_numpy(getattr(report, dims)).sum())
    least = 0.01 * (1.0 if report.prior_var is None else to_numpy(report.prior_var).ravel())
    active = expected["var_mu"] > least
    assert report.active.flatten().tolist() == active.tolist()
    assert report.collapsed.flatten().tolist() == (expected["kl_dims"] < 0.01).tolist()
    assert report.active_units == int(active.sum())
    assert report.collapsed_units == int((expected["kl_dims"] < 0.01).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values(dtype, backend, config, device):
    mu, logvar = make_inputs((9, 22), dtype=dtype, device=device)
    mu[:, 3:9], logvar[:, 3:9] = 1e-3 * mu[:, 3:9], 1e-3 * logvar[:, 3:9]
    check(vaekl.diagnose(mu, logvar, backend=backend), mu, logvar)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", [None, "event", "number"])
def test_to_a_prior(kind, scale, dtype, backend, device):
    """Of any form; a third of the dimensions all but collapsed onto it."""
    mu, logvar = make_inputs((9, 4, 6), dtype=torch.float64, device=device)
    near = slice(0, 2)
    prior = None
    if kind is not None:
        shape = (4, 6) if kind == "event" else (1, 1)
        mean, of_prior = make_inputs(shape, dtype=torch.float64, seed=1, device=device)
        mu[..., near] = (mean + 1e-3 * mu)[..., near]
        logvar[..., near] = (of_prior + 1e-3 * logvar)[..., near]
        prior = mean.to(dtype), scale_of(scale, of_prior).to(dtype)
    given = mu.to(dtype), scale_of(scale, logvar).to(dtype)
    report = vaekl.diagnose(*given, scale=scale, prior=prior, backend=backend)
    check(report, *given, scale=scale, prior=prior)
    kl = vaekl.kl_loss(*given, scale=scale, prior=prior, backend=backend)
    assert float(kl) == pytest.approx(report.kl, rel=1e-6)
    if kind == "event":
        assert report.prior_var.shape == (4, 6)
        assert "of prior" in str(report)
        both = vaekl.DiagnosticsAccumulator(scale=scale, prior=prior, backend=backend)
        both.update(*(t[:4] for t in given)).update(*(t[4:] for t in given))
        check(both.report(), *given, batches=2, scale=scale, prior=prior)


@pytest.mark.parametrize("scale", SCALES)
def test_the_standard_normal_is_no_prior(scale, backend, device):
    """As numbers or tensors, or of no other form than its posterior's."""
    mu, logvar = make_inputs((9, 22), device=device)
    given, one = scale_of(scale, logvar), 1 if scale in ("std", "var") else 0
    tensors = torch.zeros(22, device=device), torch.full((22,), float(one), device=device)
    plain = vaekl.diagnose(mu, given, scale=scale, backend=backend)
    accumulator = vaekl.DiagnosticsAccumulator(backend=backend).update(mu, logvar)
    for prior in (None, (0, one), tensors):
        options = {"scale": scale, "prior": prior, "backend": backend}
        report = vaekl.diagnose(mu, given, **options)
        assert report.to_dict(per_dimension=True) == plain.to_dict(per_dimension=True)
        assert report.prior_var is None
        accumulator.merge(vaekl.DiagnosticsAccumulator(**options).update(mu, given))
    assert accumulator.report().kl == pytest.approx(plain.kl, rel=1e-6)


def test_a_prior_of_numbers_is_the_same_for_every_dtype(device):
    mu, logvar = make_inputs((9, 22), device=device)
    accumulator = vaekl.DiagnosticsAccumulator(prior=(0.1, torch.tensor(0.2, dtype=torch.float64)))
    report = accumulator.update(mu, logvar).update(mu.double(), logvar.double()).report()
    expected = torch.full((22,), math.exp(0.2), dtype=torch.float64)
    torch.testing.assert_close(report.prior_var, expected, rtol=1e-15, atol=0)


def test_counts_are_of_what_was_given(device):
    """Neither of what is left without the prior, nor of a logarithm."""
    mu = torch.tensor([[1.0, torch.nan], [torch.inf, 0.0]], device=device)
    logvar = torch.tensor([[31.0, 0.0], [-31.0, 5.0]], device=device)
    report = vaekl.diagnose(mu, logvar, prior=(2.0, 25.0))
    assert report.nonfinite_mu_dims.tolist() == [1, 1]
    assert report.logvar_outside_dims.tolist() == [2, 0]
    report = vaekl.diagnose(mu, torch.tensor([[1.0, 0.0], [-1.0, 1e-20]]).to(mu), scale="std")
    assert report.nonfinite_logvar_dims.tolist() == [1, 1]
    assert report.logvar_outside_dims.tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (6, 1), (3, 2), (2, 37), (33, 4), (500, 3)])
def test_shapes(shape, backend, many_programs, device):
    if shape[0] == 500 and backend == "triton":
        shape = (100, 3)
    mu, logvar = make_inputs(shape, device=device)
    check(vaekl.diagnose(mu, logvar, backend=backend), mu, logvar)


@pytest.mark.parametrize("shape", [(3000, 70), (40, 5000), (70000, 3)])
def test_large_inputs(shape, device):
    """Several pieces along rows and columns, threads, and chunks of the eager backend."""
    mu, logvar = make_inputs(shape, device=device)
    for backend in ("cpu", "eager") if device == "cpu" else ("triton", "eager"):
        check(vaekl.diagnose(mu, logvar, backend=backend), mu, logvar)


def test_eager_in_chunks(monkeypatch, device):
    monkeypatch.setattr(eager, "_CHUNK", 50)
    mu, logvar = make_inputs((33, 12), device=device)
    check(vaekl.diagnose(mu, logvar, backend="eager"), mu, logvar)


@pytest.mark.parametrize(
    "layout", ["halves", "transposed", "channels_last", "expanded", "steps", "negated"]
)
@pytest.mark.parametrize("batch_dims", [0, 1, 2, 4])
def test_layouts(layout, batch_dims, backend, many_programs, device):
    if layout == "negated":
        mu = torch.randn(2, 3, 2, 4, dtype=torch.complex64, device=device).conj().imag
        assert mu.is_neg()
        logvar = mu
    else:
        mu, logvar = make_inputs((2, 3, 2, 4), layout=layout, device=device)
    report = vaekl.diagnose(mu, logvar, batch_dims=batch_dims, backend=backend)
    check(report, mu.resolve_neg(), logvar.resolve_neg(), batch_dims)


def test_wide_offsets(many_programs, device, monkeypatch):
    """The int64 variant, which tensors past 2^31 elements take, on small ones."""
    monkeypatch.setattr(geometry, "NARROW_OFFSETS", 0)
    geometry.view.cache_clear()
    mu, logvar = make_inputs((5, 3, 2, 4), layout="channels_last", device=device)
    try:
        check(vaekl.diagnose(mu, logvar, backend="triton"), mu, logvar)
    finally:
        geometry.view.cache_clear()


def test_mixed_dtypes(backend, device):
    mu, logvar = make_inputs(
        (5, 6), dtype=torch.bfloat16, logvar_dtype=torch.float64, device=device
    )
    check(vaekl.diagnose(mu, logvar, backend=backend), mu, logvar)


@pytest.mark.parametrize("mean", [1e4, -3e4])
@pytest.mark.parametrize("first", [0.0, 50.0])
def test_variance_far_from_zero(mean, first, backend, many_programs, device):
    """mean^2 is 1e8 times the variance, and the first sample, the shift, may be an outlier."""
    mu, logvar = make_inputs((40, 5), device=device)
    mu[0] += first
    mu = mu + mean
    mu[:, 4] = mean  # no variance at all
    report = vaekl.diagnose(mu, logvar, backend=backend)
    var = np.var(to_numpy(mu), axis=0)
    assert var[4] == report.var_mu[4] == 0
    np.testing.assert_allclose(report.var_mu, var, rtol=1e-12)
    check(report, mu, logvar)


@pytest.mark.parametrize("scale", [10.0, 1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("shift", [0.0, -0.99, -1.01, -12.0, 8.0])
def test_identity(scale, shift, backend, device):
    """kl_dims = aggregate_kl_dims + information, and nothing is negative."""
    mu, logvar = make_inputs((16, 11), dtype=torch.float64, scale=scale, device=device)
    logvar = logvar + shift
    report = vaekl.diagnose(mu, logvar, backend=backend)
    both = report.aggregate_kl_dims + report.information_dims
    torch.testing.assert_close(report.kl_dims, both, rtol=1e-12, atol=1e-15)
    assert (report.information_dims >= 0).all()
    assert (report.aggregate_kl_dims >= 0).all()
    assert (report.kl_dims >= report.kl_of_mean_dims - 1e-15).all()
    check(report, mu, logvar)


@pytest.mark.parametrize("logvar", [-25.0, -12.3, -1.7, -0.7, -0.31, 0.0, 0.1, 3.3])
def test_one_code_for_all_carries_nothing(logvar, backend, device):
    """However far from the prior: all of its KL is the aggregate's."""
    same = torch.full((50, 2), logvar, device=device)
    report = vaekl.diagnose(same + 30, same, backend=backend)
    assert report.information_dims.max() < 1e-13
    assert report.information_dims.min() >= 0  # never below, by rounding
    torch.testing.assert_close(report.aggregate_kl_dims, report.kl_dims, rtol=1e-13, atol=0)
    assert report.active_units == 0


def test_known_values(backend, device):
    """Two samples in opposite corners: the KL of the mean sees nothing of them."""
    mu = torch.tensor([[3.0], [-3.0]], device=device)
    report = vaekl.diagnose(mu, torch.zeros_like(mu), backend=backend)
    assert report.kl == 4.5
    assert report.kl_of_mean == report.kl_of_mean_all == 0
    assert report.var_mu.tolist() == [9.0]
    assert report.information == pytest.approx(0.5 * math.log(10), rel=1e-15)
    assert report.aggregate_kl == pytest.approx(4.5 - 0.5 * math.log(10), rel=1e-15)


def test_the_oracle_itself():
    """Against the definitions in 60 digits, collapsed dimensions too."""
    mu, logvar = (t.double() for t in make_inputs((5, 4)))
    scales = torch.tensor([1.0, 1e-2, 1e-4, 4.0], dtype=torch.float64)
    mu, logvar = mu * scales, logvar * scales
    found = diagnostics(mu, logvar)
    with mpmath.workdps(60):
        for j in range(4):
            m, v = ([mpmath.mpf(x) for x in t[:, j].tolist()] for t in (mu, logvar))
            mean, mean_v, count = mpmath.fsum(m) / 5, mpmath.fsum(v) / 5, 5
            var = mpmath.fsum((x - mean) ** 2 for x in m) / count
            total = mpmath.fsum(mpmath.exp(x) for x in v) / count + var
            exact = {
                "kl_dims": sum(a * a + mpmath.exp(b) - 1 - b for a, b in zip(m, v)) / 2 / count,
                "kl_of_mean_dims": (mean**2 + mpmath.exp(mean_v) - 1 - mean_v) / 2,
                "aggregate_kl_dims": (mean**2 + total - 1 - mpmath.log(total)) / 2,
                "information_dims": (mpmath.log(total) - mean_v) / 2,
                "var_mu": var,
            }
            for name, value in exact.items():
                assert found[name][j] == pytest.approx(float(value), rel=1e-12), name


def test_totals_are_the_losses(backend, device):
    mu, logvar = make_inputs((33, 7), device=device)
    report = vaekl.diagnose(mu, logvar, backend=backend)
    oracle, over_all = Oracle(mu, logvar), Oracle(mu, logvar, mean_over="all")
    assert report.kl == pytest.approx(float(oracle.kl), rel=1e-13)
    assert report.kl_of_mean == pytest.approx(float(oracle.kl_of_mean), rel=1e-12)
    assert report.kl_of_mean_all == pytest.approx(float(over_all.kl_of_mean), rel=1e-12)


def test_non_finite_values_are_counted_and_named(backend, many_programs, device):
    mu, logvar = make_inputs((9, 12), device=device)
    clean = vaekl.diagnose(mu, logvar, backend=backend)
    mu[0, 2], mu[4, 2], mu[5, 7], logvar[8, 11] = math.nan, math.inf, -math.inf, math.nan
    report = vaekl.diagnose(mu, logvar, backend=backend)
    assert report.nonfinite == 4
    assert report.nonfinite_mu_dims.tolist() == [0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert report.nonfinite_logvar_dims.tolist() == [0] * 11 + [1]
    for name in ("kl_dims", "kl_of_mean_dims", "aggregate_kl_dims", "information_dims", "mean_mu",
                 "var_mu", "mean_logvar", "mean_var"):  # fmt: skip
        values, before = getattr(report, name), getattr(clean, name)
        assert values.isnan().nonzero().flatten().tolist() == [2, 7, 11], name
        keep = ~values.isnan()
        assert torch.equal(values[keep], before[keep]), name
    totals = report.to_dict()
    for name in ("kl", "kl_of_mean", "kl_of_mean_all", "aggregate_kl", "information"):
        assert math.isnan(totals[name]), name
    assert report.verdict == (
        "4 values not finite (3 of mu, 1 of logvar) in dimensions 2, 7, 11: what depends on them "
        "is NaN."
    )
    assert report.verdict in str(report)
    assert not report.collapsed[[2, 7, 11]].any()


def test_logvar_outside_its_range(backend, many_programs, device):
    mu, logvar = make_inputs((10, 4), device=device)
    logvar[0, 1], logvar[3, 1], logvar[4, 3] = -31.0, 21.0, 90.0
    logvar[5, 2], logvar[6, 2] = -30.0, 20.0  # inside
    report = vaekl.diagnose(mu, logvar, backend=backend)
    assert report.logvar_outside_dims.tolist() == [0, 2, 0, 1]
    assert report.logvar_outside == 3
    assert report.logvar_outside_share == 3 / 40
    assert "7.50% of logvar is outside" in report.verdict
    logvar[4, 3] = math.inf  # counted once, as what it is
    report = vaekl.diagnose(mu, logvar, backend=backend)
    assert report.logvar_outside_dims.tolist() == [0, 2, 0, 0]
    assert report.nonfinite == 1


@pytest.mark.parametrize("logvar", [-2000.0, 2000.0])
def test_what_float64_does_not_hold_is_not_made_up(logvar, backend, device):
    logvar = torch.full((3, 1), logvar, device=device)
    report = vaekl.diagnose(torch.zeros_like(logvar), logvar, backend=backend)
    assert report.kl == pytest.approx(math.inf if logvar[0] > 0 else 999.5)
    assert report.information_dims.isnan().all()
    assert report.aggregate_kl_dims.isnan().all()
    assert report.logvar_outside_share == 1


def test_no_gradient(backend, device):
    mu, logvar = (t.requires_grad_() for t in make_inputs((5, 4), device=device))
    report = vaekl.diagnose(2 * mu, logvar, backend=backend)
    for name, value in vars(report).items():
        if isinstance(value, torch.Tensor):
            assert not value.requires_grad, name
            assert value.device.type == "cpu", name
    with torch.no_grad():
        assert vaekl.diagnose(2 * mu, logvar, backend=backend).kl == report.kl
    with torch.inference_mode():
        assert vaekl.diagnose(2 * mu, logvar, backend=backend).kl == report.kl


def test_repeated_calls_are_bitwise_equal(backend, config, device):
    mu, logvar = make_inputs((9, 22), device=device)
    before = mu.clone(), logvar.clone()
    first, second = (vaekl.diagnose(mu, logvar, backend=backend) for _ in range(2))
    for name, value in vars(first).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(second, name)), name
    assert torch.equal(mu, before[0])
    assert torch.equal(logvar, before[1])


def test_a_default_device_does_not_matter(backend, device):
    mu, logvar = make_inputs((5, 4), device=device)
    expected = str(vaekl.diagnose(mu, logvar, backend=backend))
    torch.set_default_device("meta")
    try:
        assert str(vaekl.diagnose(mu, logvar, backend=backend)) == expected
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("sizes", [(40,), (1,) * 40, (7, 13, 0, 20), (39, 1)])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_batches_one_by_one(sizes, mean, backend, device):
    if backend == "triton" and len(sizes) == 40:
        sizes = (1,) * 4 + (36,)
    mu, logvar = make_inputs((40, 6), device=device)
    mu = mu + mean
    accumulator = vaekl.DiagnosticsAccumulator(backend=backend)
    for batch in zip(mu.split(list(sizes)), logvar.split(list(sizes))):
        assert accumulator.update(*batch) is accumulator
    assert accumulator.samples == 40
    assert repr(accumulator) == "<DiagnosticsAccumulator of 40 samples>"
    check(accumulator.report(), mu, logvar, batches=len(sizes))


def test_workers_are_merged(backend, device):
    """In any order and grouping, pickled on the way."""
    mu, logvar = make_inputs((12, 2, 3), device=device)
    mu[5, 0, 1], logvar[1, 1, 1] = math.nan, -40
    whole = vaekl.diagnose(mu, logvar, batch_dims=1, backend=backend)
    parts = list(zip(mu.split([5, 1, 6]), logvar.split([5, 1, 6])))
    for order in itertools.permutations(range(3)):
        workers = [
            pickle.loads(pickle.dumps(vaekl.DiagnosticsAccumulator(backend=backend).update(*p)))
            for p in parts
        ]
        first = vaekl.DiagnosticsAccumulator()
        inner = workers[order[1]].merge(workers[order[2]])
        before = workers[order[0]].samples
        assert (
            first.merge(workers[order[0]]).merge(inner).merge(vaekl.DiagnosticsAccumulator())
            is first
        )
        assert workers[order[0]].samples == before
        report = first.report()
        assert report.nonfinite == 1
        assert report.logvar_outside_dims.sum() == 1
        keep = ~whole.kl_dims.isnan()
        assert torch.equal(report.kl_dims.isnan(), ~keep)
        torch.testing.assert_close(report.kl_dims[keep], whole.kl_dims[keep])
        torch.testing.assert_close(report.var_mu[keep], whole.var_mu[keep])


def test_bad_input():
    good, diagnose = torch.zeros(4, 3), vaekl.diagnose
    accumulator = vaekl.DiagnosticsAccumulator
    with pytest.raises(TypeError, match=r"mu must be a torch\.Tensor, got list"):
        diagnose([1.0], good)
    with pytest.raises(ValueError, match=r"logvar must have the shape of mu, \(4, 3\)"):
        diagnose(good, good[:2])
    with pytest.raises(ValueError, match="batch_dims must be in"):
        diagnose(good, good, batch_dims=3)
    with pytest.raises(ValueError, match="scale must be one of"):
        diagnose(good, good, scale="sigma")
    with pytest.raises(ValueError, match=r"a prior without batch axes.* shapes \(4, 3\) and \(\)"):
        diagnose(good, good, prior=(good, 0.0))
    for wrong in ((0.0, 0.0), (0.0, -1.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="prior must be finite"):
            diagnose(good, good + 1, scale="std", prior=wrong)
    with pytest.raises(TypeError, match=r"prior must be a pair \(mean, scale\) or None, got int"):
        accumulator(prior=3)
    with pytest.raises(ValueError, match="the prior's mean"):
        diagnose(good, good, prior=(good[0, :2], 0.0))
    one = torch.zeros(3)
    changing = accumulator(prior=(one, 0.0)).update(good, good)
    one += 1
    with pytest.raises(ValueError, match="the batch's prior differs"):
        changing.update(good, good)
    with pytest.raises(ValueError, match="other's prior differs"):
        accumulator(prior=(1.0, 0.0)).update(good, good).merge(accumulator().update(good, good))
    with pytest.raises(ValueError, match="backend must be one of"):
        diagnose(good, good, backend="gpu")
    for empty in (torch.zeros(0, 3), torch.zeros(4, 0)):
        with pytest.raises(ValueError, match="mu must have at least one element, got shape"):
            diagnose(empty, empty)
    with pytest.raises(ValueError, match="meta device"):
        diagnose(good.to("meta"), good.to("meta"))
    with pytest.raises(ValueError, match="has seen no samples"):
        accumulator().report()
    with pytest.raises(ValueError, match="has seen no samples"):
        accumulator().update(good[:0], good[:0]).report()
    with pytest.raises(ValueError, match=r"events of shape \(3,\), as .* got mu of shape \(4, 2\)"):
        accumulator().update(good, good).update(good[:, :2], good[:, :2])
    with pytest.raises(ValueError, match=r"other must have events of shape \(3,\), got \(2,\)"):
        accumulator().update(good, good).merge(accumulator().update(good[:, :2], good[:, :2]))
    with pytest.raises(
        TypeError, match="other must be a DiagnosticsAccumulator, got DiagnosticsRe"
    ):
        accumulator().merge(diagnose(good, good))
    with pytest.raises(ValueError, match="backend must be one of"):
        accumulator(backend="gpu")
    with pytest.raises(TypeError, match="batch_dims must be an int, got str"):
        accumulator(batch_dims="2")
