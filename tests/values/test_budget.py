"""The error budget itself: what it lets pass, and what not, where a dtype's range ends."""

import math

import numpy as np
import pytest
import torch

import vaekl
from vaekl.reference import Oracle
from vaekl.testing import gradient_bounds, kl_of_mean_bound, step, unit, worst

# Largest finite value, and the least that rounds to inf: half of its last digit above.
RANGES = {
    torch.float16: (65504.0, 65520.0),
    torch.bfloat16: (255 * 2.0**120, 511 * 2.0**119),
    torch.float32: (2.0**128 - 2.0**104, 2.0**128 - 2.0**103),
}
INF = math.inf


def ratio(dtype, actual, expected, bound):
    return worst(
        torch.tensor([actual], dtype=torch.float64).to(dtype),
        np.array([expected]),
        np.array([bound]),
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", RANGES)
def test_inf_stands_for_all_that_rounds_to_it(dtype, sign):
    largest, least = RANGES[dtype]
    digit = 2 * (least - largest)
    near, far = sign * (least - digit / 4), sign * 2 * least
    # A computed value half a digit off rounds to inf; one an eighth of a digit off does not.
    assert ratio(dtype, sign * INF, near, digit / 2) == 0.5
    assert ratio(dtype, sign * INF, near, digit / 8) == 2
    assert ratio(dtype, sign * INF, sign * least, 0) == 0
    assert ratio(dtype, sign * INF, far, 0) == 0
    assert ratio(dtype, sign * INF, -far, digit) > 1e2
    assert ratio(dtype, sign * INF, 0.0, digit) > 1e2


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", RANGES)
def test_the_largest_finite_value_is_right_within_its_bound(dtype, sign):
    largest, least = RANGES[dtype]
    past = sign * (largest + 2 * (least - largest))
    assert ratio(dtype, sign * largest, past, 4 * (least - largest)) == 0.5
    assert ratio(dtype, sign * largest, past, least - largest) == 2
    assert ratio(dtype, sign * largest, sign * INF, INF) == INF
    assert ratio(dtype, -sign * largest, past, least - largest) > 1e2


def test_float64_ends_where_the_oracles_numbers_do():
    largest = torch.finfo(torch.float64).max
    assert ratio(torch.float64, INF, INF, 1.0) == 0
    assert ratio(torch.float64, INF, largest, 2.0**969) == 2
    assert ratio(torch.float64, largest, INF, 1.0) == INF


def test_nan_is_equal_to_nan_alone():
    assert ratio(torch.float32, math.nan, math.nan, 0) == 0
    assert ratio(torch.float32, math.nan, 1.0, INF) == INF
    assert ratio(torch.float32, INF, math.nan, INF) == INF
    assert ratio(torch.float32, 1.0, 1.0, 0) == 0
    assert ratio(torch.float32, 1.0, 2.0, 0) == INF
    assert worst(torch.zeros(0), np.zeros(0), np.zeros(0)) == 0


@pytest.mark.parametrize("dtype", RANGES)
def test_whatever_rounding_gives_is_right(dtype):
    """Values within a bound of the exact one, rounded: to inf, to the largest, or below."""
    largest, least = RANGES[dtype]
    digit = 2 * (least - largest)
    draw = np.random.default_rng(0)
    exact = least + digit * draw.uniform(-3, 3, 10_000)
    computed = torch.tensor(exact + digit * draw.uniform(-1, 1, 10_000))
    stored = computed.to(dtype)
    assert stored.isinf().any()
    assert not stored.isinf().all()
    assert 0.9 < worst(stored, exact, 1.5 * digit) <= 1


def test_gradients_across_the_end_of_the_range(backend, device):
    """g mu and g (e^logvar - 1) / 2 from half of float16's range to twice, densely at its end."""
    products = torch.cat([torch.linspace(65400, 65640, 241), torch.logspace(4.5, 5.1, 50)])
    upstream = products.repeat(2)[:, None].double()
    signs = torch.ones(len(upstream), 1)
    signs[1::2] = -1
    mu = signs.repeat(1, 3).to(device, torch.float16)
    logvar = torch.full_like(mu, math.log(3))
    gradient = upstream[:, 0].to(device, torch.float32)
    call = lambda m, v: vaekl.kl_loss(m, v, reduction="none", backend=backend)  # noqa: E731
    dmu, dlogvar = step(call, (mu, logvar), [gradient]).gradients
    oracle = Oracle(mu, logvar, reduction="none")
    expected = oracle.gradients(None, gradient)
    bounds = gradient_bounds(oracle, torch.float32, torch.float16, None, gradient)
    for found, name in ((dmu, "dmu"), (dlogvar, "dlogvar")):
        assert found.isinf().any()
        assert found.isfinite().any()
        assert worst(found, expected[name], bounds[name]) <= 1


def test_means_whose_terms_cancel(backend, device):
    """A KL of the mean that is 0: float32 may leave what a few units of the terms give, no more."""
    half = torch.randn(50, 6) * torch.tensor([1.0, 1e-3]).repeat(25)[:, None]
    mu, logvar = (torch.cat([half, -half])[torch.randperm(100)].to(device) for _ in range(2))
    oracle = Oracle(mu, logvar)
    assert oracle.kl_of_mean == 0
    bound = kl_of_mean_bound(oracle, torch.float32)
    assert worst(vaekl.kl_of_mean(mu, logvar, backend=backend), oracle.kl_of_mean, bound) <= 1
    units = 8 * unit(torch.float32) * half.abs().mean(0).cpu().double()
    squares = (0.5 * units**2 + 0.25 * units**2).sum().item()
    assert bound == pytest.approx(squares, rel=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_means_that_do_not_cancel_have_the_slope_times_their_units(size):
    """The squares add nothing to speak of."""
    oracle = Oracle(np.full((100, 6), size), np.full((100, 6), -size))
    units = 8 * unit(torch.float32) * size
    first = 6 * units * (size + 0.5 * abs(math.expm1(-size))) + 5e-7 * oracle.kl_of_mean
    assert kl_of_mean_bound(oracle, torch.float32) == pytest.approx(first, rel=1e-6)
