"""Odd input gives what plain torch gives; bad input is in test_bad_input.py."""

import contextlib
import math
import re

import numpy as np
import pytest
import torch

import vaekl
from vaekl.reference import torch_reparameterize_kl
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


@pytest.mark.parametrize("slope", [*SLOPES, "operator"])
@pytest.mark.parametrize("clamp", [(-30.0, 20.0), (-0.5, 0.7), (None, 0.7), (-0.5, None)])
def test_the_gradient_is_0_at_the_bounds_of_clamp(clamp, slope, backend, device, operators):
    """And beyond, on every road and every torch, whose own clamp had 1 at the bounds before 2.14.

    A bound counts in the dtype computed in.
    """
    low, high = (0.0 if end is None else end for end in clamp)
    exact = torch.tensor([low, high, low - 1, high + 1, 0.25 * (low + high)], dtype=torch.float32)
    inside = torch.tensor([clamp[0] is None, clamp[1] is None] * 2 + [True])
    slopes = 0.5 * (torch.exp(0.5 * exact) + torch.expm1(exact))
    logvar = exact.to(device).requires_grad_()
    for dtype in (torch.float16, torch.float32):

        def loss(v, dtype=dtype):
            m = torch.zeros_like(v, dtype=dtype)
            options = {"clamp": clamp, "backend": backend, "batch_dims": v.dim()}
            z, kl, _ = vaekl.reparameterize_kl(
                m, v, eps=torch.ones_like(m), reduction="sum", kl_of_mean=False, **options
            )
            return z.sum() + kl

        with operators if slope == "operator" else contextlib.nullcontext():
            found = SLOPES.get(slope, SLOPES["autograd"])(loss, logvar)
        torch.testing.assert_close(found.cpu(), torch.where(inside, slopes, 0.0))
    if slope == "operator":
        assert any("vaekl.reparameterize_kl_backward" in name for name in operators.names)


def test_nan_has_no_gradient_where_logvar_is_clamped(backend, device):
    logvar = torch.tensor([math.nan, 0.5], device=device, requires_grad=True)
    kl = vaekl.kl_loss(
        torch.zeros_like(logvar), logvar, batch_dims=1, clamp=(None, 1), backend=backend
    )
    kl.backward()
    assert logvar.grad.tolist() == [0.0, pytest.approx(0.25 * math.expm1(0.5))]


def test_the_second_derivative_is_0_at_the_bounds_of_clamp(backend, device):
    logvar = torch.tensor([[-0.5], [0.7], [0.1]], device=device, requires_grad=True)
    eps, mu = torch.ones_like(logvar), torch.zeros_like(logvar)
    z, kl, _ = vaekl.reparameterize_kl(
        mu, logvar, eps=eps, clamp=(-0.5, 0.7), reduction="sum", backend=backend
    )
    slope = torch.autograd.grad(z.sum() + kl, logvar, create_graph=True)[0]
    curve = torch.autograd.grad(slope.sum(), logvar)[0].flatten()
    assert curve[:2].tolist() == [0.0, 0.0]
    expected = 0.25 * math.exp(0.05) + 0.5 * math.exp(0.1)
    assert curve[2].item() == pytest.approx(expected, rel=1e-6)


def test_an_infinite_bound_of_clamp_is_none(backend, device):
    logvar = torch.tensor([-math.inf, 0.0, 1.0, math.inf], device=device)[:, None]
    for clamp, expected in (
        ((None, 0.5), [-0.5, 0.0, 0.0, 0.0]),
        ((-math.inf, 0.5), [-0.5, 0.0, 0.0, 0.0]),
        ((-0.5, math.inf), [0.0, 0.0, 0.5 * math.expm1(1.0), math.inf]),
        ((None, None), [-0.5, 0.0, 0.5 * math.expm1(1.0), math.inf]),
    ):
        leaf = logvar.clone().requires_grad_()
        kl = vaekl.kl_loss(torch.zeros_like(leaf), leaf, clamp=clamp, backend=backend)
        kl.backward(torch.tensor(4.0, device=device))
        torch.testing.assert_close(leaf.grad.flatten().cpu(), torch.tensor(expected))


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
def test_clamp_too_large_for_float32_is_infinite(clamp, same, dtype, storage, backend, device):
    """Where torch.clamp raises "value cannot be converted to type float without overflow"."""
    mu, logvar = make_inputs((4, 6), dtype=dtype, device=device)
    found = []
    for bounds in (clamp, same):
        options = {"seed": 3, "clamp": bounds, "backend": backend}
        found.append(
            step(lambda *t, o=options: storage.call(*t, **o), storage.store(mu, logvar)).tensors
        )
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_clamp_of_float64_has_its_range(backend, device):
    logvar = torch.full((1, 1), -1e40, dtype=torch.float64, device=device)
    kl = vaekl.kl_loss(torch.zeros_like(logvar), logvar, clamp=(-1e39, None), backend=backend)
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


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
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
@pytest.mark.parametrize("clamp", [None, (-30.0, 20.0)])
def test_special_values_as_plain_torch(dtype, clamp, backend, device):
    """NaN, inf and overflow: the same in the same places, values and gradients."""
    grid = torch.tensor([(m, v) for m in SPECIAL for v in SPECIAL], dtype=dtype, device=device)
    grid = grid[:, None]
    eps = torch.full((len(grid), 1), 1.5, dtype=dtype, device=device)
    results = []
    for function in (vaekl.reparameterize_kl, torch_reparameterize_kl):
        mu, logvar = grid[..., 0].clone().requires_grad_(), grid[..., 1].clone().requires_grad_()
        options = {"backend": backend} if function is vaekl.reparameterize_kl else {}
        out = function(mu, logvar, eps=eps, reduction="none", clamp=clamp, **options)
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
