"""Values and gradients against the float64 oracle, under the budgets of vaekl.testing."""

import itertools

import numpy as np
import pytest
import torch

import vaekl
from vaekl import _layout
from vaekl.reference import SEED_OFFSET, Oracle, normal, to_numpy, torch_reparameterize_kl
from vaekl.testing import (
    EPS_BUDGET,
    KL_BUDGET,
    gradient_bounds,
    kl_of_mean_bound,
    make_inputs,
    unit,
    worst,
)

REDUCTIONS = ["none", "sum", "batchmean", "mean"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SEED = 0x1234_5678_9ABC


def compute_dtype(*tensors):
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def rows(shape, batch_dims):
    return int(np.prod(shape[:batch_dims])), int(np.prod(shape[batch_dims:]))


def check(mu, logvar, *, backend, eps=None, needs=(True, True, True), kl_of_mean=True, **options):
    """One forward and backward with random upstream gradients; every output within its budget."""
    leaves = [mu, logvar, eps]
    for leaf, need in zip(leaves, needs):
        if leaf is not None:
            leaf.requires_grad_(need)
    noise = {"eps": eps} if eps is not None else {"seed": SEED}
    out = vaekl.reparameterize_kl(
        mu, logvar, backend=backend, kl_of_mean=kl_of_mean, **noise, **options
    )
    batch_dims = options.get("batch_dims", 1)
    drawn = None
    if eps is None:
        drawn = normal(SEED, SEED_OFFSET, *rows(mu.shape, batch_dims)).reshape(mu.shape)
    oracle = Oracle(mu, logvar, eps if eps is not None else drawn, **options)
    dtype = compute_dtype(mu, logvar, eps)

    assert out.kl.dtype == dtype
    assert out.kl.shape == oracle.kl.shape
    assert worst(out.kl, oracle.kl, KL_BUDGET[dtype] * oracle.kl) <= 1
    if kl_of_mean:
        assert out.kl_of_mean.dtype == dtype
        assert worst(out.kl_of_mean, oracle.kl_of_mean, kl_of_mean_bound(oracle, dtype)) <= 1
    else:
        assert out.kl_of_mean is None
    check_z(out.z, mu, logvar, eps, oracle, dtype, options.get("clamp"))

    torch.manual_seed(1)
    dz = torch.randn(mu.shape, dtype=torch.float64).to(out.z)
    dkl = torch.randn(out.kl.shape, dtype=torch.float64).to(out.kl)
    h = torch.randn((), dtype=torch.float64).to(out.kl) if kl_of_mean else None
    if not (needs[0] or needs[1]):  # then the KLs are constants
        assert not out.kl.requires_grad
        dkl = h = None
    pairs = [(o, g) for o, g in zip(out, (dz, dkl, h)) if g is not None]
    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    expected = oracle.gradients(dz, dkl, h)
    names = ("dmu", "dlogvar", "deps")
    for name, leaf, need in zip(names, leaves, needs):
        if leaf is None:
            continue
        if not need:
            assert leaf.grad is None
            continue
        assert leaf.grad.dtype == leaf.dtype
        bounds = gradient_bounds(oracle, dtype, leaf.dtype, dz, dkl, h, drawn=eps is None)
        assert worst(leaf.grad, expected[name], bounds[name]) <= 1, name


def check_z(z, mu, logvar, eps, oracle, dtype, clamp):
    """Error at most that of plain torch in the same dtype, plus one ulp of the output dtype."""
    plain_eps = eps if eps is not None else torch.as_tensor(oracle.eps).to(z)
    with torch.no_grad():
        plain = torch_reparameterize_kl(
            mu.flatten(), logvar.flatten(), plain_eps.flatten(), batch_dims=0, clamp=clamp
        )[0].view(mu.shape)
    assert z.dtype == plain.dtype
    size = np.abs(oracle.mu) + np.abs(oracle.z - oracle.mu)
    ulp = 2 * unit(z.dtype) * size
    extra = 0.0
    if eps is None:
        extra = EPS_BUDGET[dtype] * np.abs((oracle.z - oracle.mu) / oracle.eps)
        plain_error = 0.0
    else:
        plain_error = np.max(np.abs(to_numpy(plain) - oracle.z) / ulp)
    assert worst(z, oracle.z, (plain_error + 1) * ulp + extra) <= 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mean_over", ["batch", "all", None])
def test_reductions(reduction, mean_over, backend, config, device):
    mu, logvar = make_inputs((7, 21), device=device)
    check(
        mu,
        logvar,
        backend=backend,
        reduction=reduction,
        mean_over=mean_over or "batch",
        kl_of_mean=mean_over is not None,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [False, True])
def test_dtypes(dtype, given, backend, many_programs, device):
    mu, logvar = make_inputs((5, 12), dtype=dtype, device=device)
    eps = make_inputs((5, 12), dtype=dtype, device=device, seed=9)[0] if given else None
    check(mu, logvar, eps=eps, backend=backend)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.bfloat16, None),
        (torch.bfloat16, torch.float32, None),
        (torch.float32, torch.float64, torch.float32),
        (torch.float32, torch.float32, torch.float64),
        (torch.float16, torch.float16, torch.float32),
    ],
)
def test_mixed_dtypes_promote_as_torch_does(dtypes, backend, device):
    mu, logvar = make_inputs((4, 6), dtype=dtypes[0], logvar_dtype=dtypes[1], device=device)
    eps = None
    if dtypes[2] is not None:
        eps = make_inputs((4, 6), dtype=dtypes[2], device=device, seed=9)[0]
    check(mu, logvar, eps=eps, backend=backend)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (6, 1), (3, 2), (2, 37), (33, 4), (1, 130)])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_shapes(shape, reduction, backend, config, device):
    if shape == (1, 130) and config.tile == 8:
        pytest.skip("65 programs of the interpreter show nothing that 17 do not")
    mu, logvar = make_inputs(shape, device=device)
    check(mu, logvar, backend=backend, reduction=reduction)


@pytest.mark.parametrize("layout", ["halves", "transposed", "channels_last", "expanded", "steps"])
@pytest.mark.parametrize(("shape", "batch_dims"), [((3, 6), 1), ((2, 3, 6), 1), ((2, 3, 6), 2)])
def test_layouts(layout, shape, batch_dims, backend, many_programs, device):
    mu, logvar = make_inputs(shape, layout=layout, device=device)
    mu, logvar = mu.detach(), logvar.detach()
    for t in (mu, logvar):
        assert not t.requires_grad
    check(mu, logvar, backend=backend, batch_dims=batch_dims, reduction="none")


@pytest.mark.parametrize("layout", ["channels_last", "expanded", "steps", "halves"])
def test_four_axes(layout, backend, many_programs, device):
    mu, logvar = make_inputs((2, 3, 2, 4), layout=layout, device=device)
    check(mu, logvar, backend=backend)
    mu, logvar = make_inputs((2, 3, 2, 4), layout=layout, device=device)
    eps = make_inputs((2, 3, 2, 4), layout="channels_last", device=device, seed=4)[0]
    check(mu, logvar, backend=backend, eps=eps)


@pytest.mark.parametrize("inner", [1024, 128])
def test_outer_axis_first_in_memory(inner, backend, device):
    """Rows that follow each other within each outer index; inner as wide as a block can be."""
    mu, logvar = (t.transpose(0, 1) for t in make_inputs((2, 3, inner), device=device))
    check(mu, logvar, backend=backend, reduction="none")


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_wide_offsets(reduction, many_programs, device, monkeypatch):
    """The int64 variant, which tensors past 2^31 elements take, on small ones."""
    monkeypatch.setattr(_layout, "NARROW_OFFSETS", 0)
    _layout.view.cache_clear()
    mu, logvar = make_inputs((2, 3, 2, 4), layout="channels_last", device=device)
    try:
        check(mu, logvar, backend="triton", reduction=reduction)
    finally:
        _layout.view.cache_clear()


def test_memory_is_poisoned(device):
    """What these tests rely on to see unwritten output."""
    assert torch.empty(3, device=device).isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_z_takes_the_memory_format_of_mu(layout, backend, device):
    mu, logvar = make_inputs((2, 3, 2, 4), layout=layout, device=device)
    z = vaekl.reparameterize(mu, logvar, backend=backend)
    assert z.stride() == mu.stride()


@pytest.mark.parametrize("upstream", ["expanded", "transposed", "none_strided"])
def test_upstream_gradients_of_any_layout(upstream, backend, many_programs, device):
    mu, logvar = make_inputs((5, 12), device=device)
    mu.requires_grad_()
    logvar.requires_grad_()
    z, kl, _ = vaekl.reparameterize_kl(mu, logvar, reduction="none", seed=SEED, backend=backend)
    dz = {
        "expanded": torch.randn(()).expand(5, 12),
        "transposed": torch.randn(12, 5).t(),
        "none_strided": torch.randn(5, 24)[:, ::2],
    }[upstream].to(device)
    dkl = torch.randn(10, device=device)[::2] if upstream != "expanded" else dz[:, 0]
    torch.autograd.backward([z, kl], [dz, dkl])
    oracle = Oracle(mu, logvar, normal(SEED, SEED_OFFSET, 5, 12), reduction="none")
    expected = oracle.gradients(dz, dkl)
    bounds = gradient_bounds(oracle, torch.float32, torch.float32, dz, dkl, drawn=True)
    assert worst(mu.grad, expected["dmu"], bounds["dmu"]) <= 1
    assert worst(logvar.grad, expected["dlogvar"], bounds["dlogvar"]) <= 1


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3))[:-1])
def test_every_subset_of_inputs(needs, backend, many_programs, device):
    mu, logvar = make_inputs((5, 12), device=device)
    eps = make_inputs((5, 12), device=device, seed=9)[0]
    check(mu, logvar, eps=eps, needs=needs, backend=backend)


@pytest.mark.parametrize("used", list(itertools.product([True, False], repeat=3))[:-1])
def test_every_subset_of_outputs(used, backend, many_programs, device):
    mu, logvar = make_inputs((5, 12), device=device)
    mu.requires_grad_()
    logvar.requires_grad_()
    out = vaekl.reparameterize_kl(mu, logvar, seed=SEED, backend=backend)
    upstream = [torch.randn(o.shape).to(o) if u else None for o, u in zip(out, used)]
    pairs = [(o, g) for o, g in zip(out, upstream) if g is not None]
    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    oracle = Oracle(mu, logvar, normal(SEED, SEED_OFFSET, 5, 12))
    expected = oracle.gradients(*upstream)
    bounds = gradient_bounds(oracle, torch.float32, torch.float32, *upstream, drawn=True)
    assert worst(mu.grad, expected["dmu"], bounds["dmu"]) <= 1
    assert worst(logvar.grad, expected["dlogvar"], bounds["dlogvar"]) <= 1


@pytest.mark.parametrize("clamp", [(-0.5, 0.7), (0.2, 3.0), (None, 0.0), (-1.0, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clamp(clamp, dtype, backend, many_programs, device):
    bounds = tuple(
        side if given is None else given
        for given, side in zip(clamp, (-float("inf"), float("inf")))
    )
    mu, logvar = make_inputs((5, 12), dtype=dtype, device=device)
    check(mu, logvar, clamp=bounds, backend=backend)
    mu, logvar = mu.detach(), logvar.detach()
    one = vaekl.kl_loss(mu, logvar, clamp=clamp, backend=backend)
    assert torch.equal(one, vaekl.kl_loss(mu, logvar, clamp=bounds, backend=backend))


def test_kl_of_mean_is_not_above_kl(backend, device):
    for scale in (3.0, 1e-3):
        mu, logvar = make_inputs((16, 8), scale=scale, device=device)
        for mean_over, reduction in (("batch", "batchmean"), ("all", "mean")):
            out = vaekl.reparameterize_kl(
                mu, logvar, mean_over=mean_over, reduction=reduction, backend=backend
            )
            assert out.kl_of_mean <= out.kl
        same = mu[:1].expand(16, 8), logvar[:1].expand(16, 8)
        out = vaekl.reparameterize_kl(*same, backend=backend)
        torch.testing.assert_close(out.kl_of_mean, out.kl)


def test_single_functions_agree_with_the_fused_one(backend, many_programs, device):
    mu, logvar = make_inputs((5, 12), device=device)
    z, kl, of_mean = vaekl.reparameterize_kl(mu, logvar, seed=3, clamp=(-1, 1), backend=backend)
    options = {"clamp": (-1, 1), "backend": backend}
    assert torch.equal(vaekl.reparameterize(mu, logvar, seed=3, **options), z)
    assert torch.equal(vaekl.kl_loss(mu, logvar, **options), kl)
    assert torch.equal(vaekl.kl_of_mean(mu, logvar, **options), of_mean)
