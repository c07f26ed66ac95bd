"""Odd input gives what plain torch gives; bad input is in test_bad_input.py."""

import contextlib
import itertools
import math
import re

import numpy as np
import pytest
import torch

import vaekl
from steps import scale_of
from vaekl.reference import SCALES, torch_reparameterize_kl
from vaekl.testing import make_inputs, step

GOOD = torch.zeros(4, 3)


def _jvps(loss, v):
    basis = torch.eye(v.numel()).to(v).reshape(-1, *v.shape)
    return torch.stack([torch.func.jvp(loss, (v,), (e,))[1] for e in basis])


#: How a gradient of logvar may be asked for: (loss of logvar, logvar) -> gradient.
SLOPES = {
    "autograd": lambda loss, v: torch.autograd.grad(loss(v), v)[0],
    "create_graph": lambda loss, v: torch.autograd.grad(loss(v), v, create_graph=True)[0],
    "torch.func.grad": lambda loss, v: torch.func.grad(loss)(v),
    "vmap": lambda loss, v: torch.func.vmap(torch.func.grad(loss))(v),
    "jvp": _jvps,
}


LOGARITHMS = ["logvar", "log_std"]
#: Scales with bounds, at which a logvar can be: of other scales no logarithm but 0 is exact.
AT_BOUNDS = [
    *itertools.product(LOGARITHMS, [(-30.0, 20.0), (-0.5, 0.7), (None, 0.7), (-0.5, None)]),
    *itertools.product(["std", "var"], [(0.0, 0.7), (-0.5, 0.0), (None, 0.0), (0.0, None)]),
]


def kl_slope(scale, given, logvar):
    """That of an element's KL where no bound is, float64."""
    with np.errstate(all="ignore"):
        slope = torch.as_tensor(SCALES[scale].slope(given.detach().double().numpy()))
    return 0.5 * torch.expm1(logvar.double()) * slope


@pytest.mark.parametrize("slope", [*SLOPES, "operator"])
@pytest.mark.parametrize(("scale", "clamp"), AT_BOUNDS)
def test_the_gradient_is_0_at_the_bounds_of_clamp(scale, clamp, slope, backend, device, operators):
    """And beyond, on every road and every torch, whose own clamp had 1 at the bounds before 2.14.

    A bound counts in the dtype computed in.
    """
    low, high = (0.0 if end is None else end for end in clamp)
    lo, hi = -math.inf if clamp[0] is None else low, math.inf if clamp[1] is None else high
    at = [low, high] if scale in LOGARITHMS else [0.0]
    exact = torch.tensor([*at, low - 1, high + 1, 0.25 * (low + high)], dtype=torch.float32)
    given = scale_of(scale, exact)
    std_slopes = torch.as_tensor(SCALES[scale].std_slope(given.double().numpy()))
    slopes = (std_slopes + kl_slope(scale, given, exact)).float()
    inside = (exact > torch.tensor(lo)) & (exact < torch.tensor(hi))
    given = given.to(device).requires_grad_()
    for dtype in (torch.float16, torch.float32):

        def loss(v, dtype=dtype):
            m = torch.zeros_like(v, dtype=dtype)
            options = {"scale": scale, "clamp": clamp, "backend": backend, "batch_dims": v.dim()}
            z, kl, _ = vaekl.reparameterize_kl(
                m, v, eps=torch.ones_like(m), reduction="sum", kl_of_mean=False, **options
            )
            return z.sum() + kl

        with operators if slope == "operator" else contextlib.nullcontext():
            found = SLOPES.get(slope, SLOPES["autograd"])(loss, given)
        torch.testing.assert_close(found.cpu(), torch.where(inside, slopes, 0.0))
    if slope == "operator":
        assert any("vaekl.reparameterize_kl_backward" in name for name in operators.names)


@pytest.mark.parametrize("scale", SCALES)
def test_nan_has_no_gradient_where_logvar_is_clamped(scale, backend, device):
    logvar = torch.tensor([math.nan, 0.5])
    given = scale_of(scale, logvar)
    leaf = given.to(device).requires_grad_()
    options = {"scale": scale, "batch_dims": 1, "clamp": (None, 1), "backend": backend}
    vaekl.kl_loss(torch.zeros_like(leaf), leaf, **options).backward()
    expected = 0.5 * kl_slope(scale, given, logvar)[1].item()
    assert leaf.grad.tolist() == [0.0, pytest.approx(expected)]


@pytest.mark.parametrize(("scale", "clamp"), AT_BOUNDS)
def test_the_second_derivative_is_0_at_the_bounds_of_clamp(scale, clamp, backend, device):
    low, high = (side if end is None else end for end, side in zip(clamp, (-1.0, 1.0)))
    at = [end for end in clamp if end is not None and (scale in LOGARITHMS or end == 0.0)]
    beyond = [end + side for end, side in zip(clamp, (-1.0, 1.0)) if end is not None]
    logvar = torch.tensor([*at, *beyond, 0.25 * (low + high)])[:, None]

    def curve(function, s, **more):
        """Of z and the KL, along each element."""
        s = s.requires_grad_()
        mu, eps = torch.zeros_like(s), torch.ones_like(s)
        z, kl, _ = function(mu, s, eps=eps, scale=scale, reduction="sum", **more)
        slope = torch.autograd.grad(z.sum() + kl, s, create_graph=True)[0]
        return torch.autograd.grad(slope.sum(), s)[0].flatten().tolist()

    given = scale_of(scale, logvar)
    (expected,) = curve(torch_reparameterize_kl, given[-1:].double())
    *outside, inside = curve(
        vaekl.reparameterize_kl, given.to(device), clamp=clamp, backend=backend
    )
    assert outside == [0.0] * (len(logvar) - 1)
    assert inside == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("clamp", "outside"),
    [
        ((None, 0.5), [False, False, True, True]),
        ((-math.inf, 0.5), [False, False, True, True]),
        ((-0.5, math.inf), [True, False, False, False]),
        ((None, None), [False] * 4),
    ],
)
def test_an_infinite_bound_of_clamp_is_none(clamp, outside, scale, backend, device):
    logvar = torch.tensor([-math.inf, 0.0, 1.0, math.inf])[:, None]
    given = scale_of(scale, logvar)
    leaf = given.to(device).requires_grad_()
    kl = vaekl.kl_loss(torch.zeros_like(leaf), leaf, scale=scale, clamp=clamp, backend=backend)
    kl.backward(torch.tensor(4.0, device=device))
    expected = kl_slope(scale, given, logvar).flatten().float()
    expected = torch.where(torch.tensor(outside), 0.0, expected)
    torch.testing.assert_close(leaf.grad.flatten().cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("clamp", "same"),
    [
        ((-1e300, 1e300), (None, None)),
        ((-1e39, 0.5), (None, 0.5)),
        ((-0.5, 10**400), (-0.5, None)),
        ((1e300, 10**400), (math.inf, math.inf)),
    ],
)
@pytest.mark.parametrize("scale", SCALES)
def test_clamp_too_large_for_float32_is_infinite(
    clamp, same, dtype, scale, storage, backend, device
):
    """Where torch.clamp raises "value cannot be converted to type float without overflow"."""
    mu, logvar = make_inputs((4, 6), dtype=dtype, device=device)
    tensors = storage.store(mu, scale_of(scale, logvar))
    found = []
    for bounds in (clamp, same):
        options = {"scale": scale, "seed": 3, "clamp": bounds, "backend": backend}
        found.append(step(lambda *t, o=options: storage.call(*t, **o), tensors).tensors)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", LOGARITHMS)  # other scales have none past 1420
def test_clamp_of_float64_has_its_range(scale, backend, device):
    given = scale_of(scale, torch.full((1, 1), -1e40, dtype=torch.float64, device=device))
    options = {"scale": scale, "clamp": (-1e39, None), "backend": backend}
    kl = vaekl.kl_loss(torch.zeros_like(given), given, **options)
    assert kl.item() == pytest.approx(0.5e39)


def test_negated_views_are_read_as_they_are(backend, device):
    """-x without a copy: a bit of the tensor that a data pointer does not show."""
    pair = torch.randn(4, 3, dtype=torch.complex64, device=device)
    mu = pair.conj().imag
    assert mu.is_neg()
    ours = vaekl.reparameterize_kl(mu, mu, seed=1, backend=backend)
    for a, b in zip(ours, vaekl.reparameterize_kl(mu.clone(), mu.clone(), seed=1, backend=backend)):
        torch.testing.assert_close(a, b)


def test_a_default_device_does_not_matter(backend, device):
    x = torch.randn(4, 3, device=device)
    torch.set_default_device("meta")
    try:
        assert vaekl.reparameterize(x, x, backend=backend).isfinite().all()
    finally:
        torch.set_default_device(None)


def test_triton_on_a_cpu_tensor_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = re.escape("backend='triton' needs tensors on a CUDA or ROCm device, got cpu")
    with pytest.raises(ValueError, match=message):
        vaekl.kl_loss(GOOD, GOOD, backend="triton")


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean", "per_dim"])
@pytest.mark.parametrize("mean_over", ["batch", "all"])
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0), (0, 2, 3)])
def test_nothing_in_as_plain_torch(shape, reduction, mean_over, backend, device):
    mu, logvar = make_inputs(shape, device=device)
    eps, options = torch.zeros(shape, device=device), dict(reduction=reduction, mean_over=mean_over)
    found = step(
        lambda m, v: vaekl.reparameterize_kl(m, v, backend=backend, **options), (mu, logvar)
    )
    plain = torch_reparameterize_kl(mu, logvar, eps, **options)
    for ours, theirs in zip(found.outputs, plain):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert all(gradient.shape == shape for gradient in found.gradients)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 6, 2)])
def test_nothing_in_moments(shape, backend, device):
    moments = torch.zeros(shape, device=device)
    found = step(
        lambda m: vaekl.reparameterize_kl_moments(m, backend=backend, reduction="sum"), [moments]
    )
    assert found.outputs.kl == 0
    assert found.gradients[0].shape == shape


def test_empty_batch_and_event_by_name(backend, device):
    """As documented: none gives an empty, sum 0, means NaN; no event, no KL."""
    empty = torch.zeros(0, 3, device=device)
    options = {"backend": backend}
    assert vaekl.kl_loss(empty, empty, reduction="none", **options).shape == (0,)
    assert vaekl.kl_loss(empty, empty, reduction="sum", **options) == 0
    assert vaekl.kl_loss(empty, empty, **options).isnan()
    assert vaekl.kl_of_mean(empty, empty, **options).isnan()
    flat = torch.zeros(4, 0, device=device)
    assert vaekl.kl_loss(flat, flat, **options) == 0
    assert torch.equal(
        vaekl.kl_loss(flat, flat, reduction="none", **options), torch.zeros(4, device=device)
    )
    assert vaekl.kl_of_mean(flat, flat, **options) == 0


SPECIAL = [math.nan, math.inf, -math.inf, 200.0, -200.0, 88.6, -88.0, 176.0, 0.0, -0.0, 30.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("scale", "clamp"), [("logvar", None), ("logvar", (-30.0, 20.0)), ("log_std", (-30.0, 20.0))]
)
def test_special_values_as_plain_torch(scale, dtype, clamp, backend, device):
    """NaN, inf and overflow: the same in the same places, values and gradients."""
    grid = torch.tensor([(m, v) for m in SPECIAL for v in SPECIAL], dtype=dtype, device=device)
    grid[:, 1] = scale_of(scale, grid[:, 1])
    grid = grid[:, None]
    eps = torch.full((len(grid), 1), 1.5, dtype=dtype, device=device)
    results = []
    for function in (vaekl.reparameterize_kl, torch_reparameterize_kl):
        mu, logvar = grid[..., 0].clone().requires_grad_(), grid[..., 1].clone().requires_grad_()
        options = {"backend": backend} if function is vaekl.reparameterize_kl else {}
        out = function(mu, logvar, eps=eps, reduction="none", scale=scale, clamp=clamp, **options)
        torch.autograd.backward([out[0], out[1]], [torch.ones_like(eps), torch.ones_like(out[1])])
        results.append([t.detach().cpu() for t in (out[0], out[1], mu.grad, logvar.grad)])
    for name, ours, theirs in zip(("z", "kl", "dmu", "dlogvar"), *results):
        # exp is good to a few units at either end of the range; below e^-87 float32 gives 0.
        torch.testing.assert_close(
            ours, theirs, rtol=1e-5, atol=1e-36, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_nan_stays_in_its_row_and_column(backend, many_programs, device):
    mu, logvar = make_inputs((6, 12), device=device)
    mu[3, 7] = math.nan
    out = vaekl.reparameterize_kl(mu, logvar, reduction="none", seed=1, backend=backend)
    assert out.kl.isnan().nonzero().flatten().tolist() == [3]
    assert out.z.isnan().nonzero().tolist() == [[3, 7]]
    assert out.kl_of_mean.isnan()


def test_zero_dimensional_and_all_batch(backend, device):
    mu = torch.tensor(0.5, device=device)
    logvar = torch.tensor(-0.3, device=device)
    z, kl, of_mean = vaekl.reparameterize_kl(mu, logvar, batch_dims=0, seed=1, backend=backend)
    expected = 0.5 * (0.25 + math.exp(-0.3) - 1 + 0.3)
    assert z.shape == ()
    assert kl.item() == pytest.approx(expected, rel=1e-6)
    assert of_mean.item() == pytest.approx(expected, rel=1e-6)
    assert vaekl.reparameterize(mu, logvar, seed=1, backend=backend).shape == ()
    mu, logvar = make_inputs((2, 3), device=device)
    rows = vaekl.kl_loss(mu, logvar, batch_dims=2, reduction="none", backend=backend)
    elements = 0.5 * (mu**2 + logvar.exp() - 1 - logvar)
    torch.testing.assert_close(rows, elements)


def test_result_is_a_named_tuple(backend, device):
    mu, logvar = make_inputs((2, 3), device=device)
    out = vaekl.reparameterize_kl(mu, logvar, backend=backend)
    assert isinstance(out, vaekl.ReparamKL)
    assert out._fields == ("z", "kl", "kl_of_mean")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kl_is_float32_for_half_and_under_autocast(dtype, backend, device):
    mu, logvar = make_inputs((4, 256), dtype=dtype, scale=4, device=device)
    big = torch.full_like(mu, 30.0)
    out = vaekl.reparameterize_kl(big, logvar, reduction="sum", backend=backend)
    assert out.kl.dtype == torch.float32
    assert out.kl > np.float32(70_000)  # float16 would be inf
    with torch.autocast(device, dtype=torch.bfloat16):
        out = vaekl.reparameterize_kl(mu, logvar, backend=backend)
    assert (out.z.dtype, out.kl.dtype, out.kl_of_mean.dtype) == (dtype, *[torch.float32] * 2)
