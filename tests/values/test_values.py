"""Values and gradients against the float64 oracle, under the budgets of vaekl.testing."""

import itertools

import pytest
import torch
from vaekl.kernels.reduction import partial_sums

import vaekl
from steps import SEED, check
from storages import PACKED, PAIR, Packed
from vaekl import _plans
from vaekl.backends import layout as geometry
from vaekl.testing import (
    make_inputs,
    random_upstream,
)

REDUCTIONS = ["none", "sum", "batchmean", "mean", "per_dim"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mean_over", ["batch", "all", None])
def test_reductions(reduction, mean_over, backend, config, device):
    check(
        make_inputs((7, 21), device=device), backend=backend, reduction=reduction,
        mean_over=mean_over or "batch", kl_of_mean=mean_over is not None,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mean_over", ["batch", "all", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions_clamped(reduction, mean_over, dtype, storage, backend, many_programs, device):
    tensors = storage.store(*make_inputs((5, 6), dtype=dtype, device=device))
    check(
        tensors, storage=storage, backend=backend, reduction=reduction,
        mean_over=mean_over or "batch", kl_of_mean=mean_over is not None, clamp=(-0.5, 0.7),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [False, True])
def test_dtypes(dtype, given, storage, backend, many_programs, device):
    tensors = storage.store(*make_inputs((5, 12), dtype=dtype, device=device))
    eps = make_inputs((5, 12), dtype=dtype, device=device, seed=9)[0] if given else None
    check(tensors, storage=storage, eps=eps, backend=backend)


@pytest.mark.parametrize("seed", [4, 7, 8])
def test_float64_of_given_noise(seed, backend, device):
    """z is held to a unit of the last place, by which an oracle in float64 would be off itself."""
    pair = make_inputs((7, 21), dtype=torch.float64, device=device, seed=seed)
    eps = make_inputs((7, 21), dtype=torch.float64, device=device, seed=100 + seed)[0]
    check(pair, eps=eps, backend=backend)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.bfloat16, None),
        (torch.bfloat16, torch.float32, None),
        (torch.float32, torch.float64, torch.float32),
        (torch.float32, torch.float32, torch.float64),
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float64, torch.bfloat16),
    ],
)
def test_mixed_dtypes_promote_as_torch_does(dtypes, backend, device):
    pair = make_inputs((4, 6), dtype=dtypes[0], logvar_dtype=dtypes[1], device=device)
    eps = None
    if dtypes[2] is not None:
        eps = make_inputs((4, 6), dtype=dtypes[2], device=device, seed=9)[0]
    check(pair, eps=eps, backend=backend)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (6, 1), (3, 2), (2, 37), (33, 4), (1, 130)])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_shapes(shape, reduction, backend, config, device):
    if shape == (1, 130) and config.tile == 8:
        pytest.skip("65 programs of the interpreter show nothing that 17 do not")
    check(make_inputs(shape, device=device), backend=backend, reduction=reduction)


LAYOUTS = ["halves", "transposed", "channels_last", "expanded", "steps"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "batch_dims"), [((3, 6), 1), ((2, 3, 6), 1), ((2, 3, 6), 2)])
def test_layouts(layout, shape, batch_dims, backend, many_programs, device):
    pair = make_inputs(shape, layout=layout, device=device)
    check(pair, backend=backend, batch_dims=batch_dims, reduction="none")


@pytest.mark.parametrize("layout", ["channels_last", "expanded", "steps", "halves"])
def test_four_axes(layout, backend, many_programs, device):
    pair = make_inputs((2, 3, 2, 4), layout=layout, device=device)
    eps = make_inputs((2, 3, 2, 4), layout="channels_last", device=device, seed=4)[0]
    check(pair, backend=backend)
    check(pair, backend=backend, eps=eps)


# (shape, dim, batch_dims): every axis of several ranks, in and after the batch axes.
PLACES = [
    ((6, 10), 1, 1),
    ((6, 10), 0, 1),
    ((6, 10), -1, 0),
    ((4,), 0, 1),
    ((3, 4, 5), 1, 1),
    ((3, 4, 6), -1, 2),
    ((2, 6, 4), 1, 2),
    ((4, 3, 5), 0, 2),
    ((2, 4, 3, 2), 1, 1),
    ((2, 3, 4, 2), 2, 1),
    ((2, 3, 2, 4), 3, 1),
    ((2, 4, 2, 2, 3), 1, 1),
]


@pytest.mark.parametrize(("shape", "dim", "batch_dims"), PLACES)
def test_moments_of_any_axis(shape, dim, batch_dims, backend, many_programs, device):
    moments = make_inputs(shape, device=device)[0]
    options = {"backend": backend, "batch_dims": batch_dims, "reduction": "none"}
    (gradient,) = check([moments], storage=Packed(dim), **options)
    assert gradient.stride() == moments.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "dim"), [((3, 8), 1), ((2, 4, 2, 4), 1), ((2, 4, 2, 4), -1),
                                            ((2, 4, 2, 2, 2), 1)])  # fmt: skip
def test_moments_of_any_layout(layout, shape, dim, backend, device):
    """The gradient has the strides that torch.empty_like gives: those of moments if dense."""
    moments = make_inputs(shape, layout=layout, device=device)[layout == "expanded"]
    (gradient,) = check([moments], storage=Packed(dim), backend=backend)
    assert gradient.stride() == torch.empty_like(moments).stride()


@pytest.mark.parametrize("inner", [1024, 128])
def test_outer_axis_first_in_memory(inner, backend, device):
    """Rows that follow each other within each outer index; inner as wide as a block can be."""
    pair = [t.transpose(0, 1) for t in make_inputs((2, 3, inner), device=device)]
    check(pair, backend=backend, reduction="none")


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_wide_offsets(reduction, many_programs, device, monkeypatch):
    """The int64 variant, which tensors past 2^31 elements take, on small ones."""
    monkeypatch.setattr(geometry, "NARROW_OFFSETS", 0)
    geometry.view.cache_clear()
    pair = make_inputs((2, 3, 2, 4), layout="channels_last", device=device)
    try:
        check(pair, backend="triton", reduction=reduction)
    finally:
        geometry.view.cache_clear()


MEANS = [{"kl_of_mean": False}, {"mean_over": "batch"}, {"mean_over": "all"}]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("of_mean", MEANS)
@pytest.mark.parametrize("shape", [(5, 130), (1, 400), (9, 110)])
def test_programs_that_walk_over_columns(shape, of_mean, reduction, many_programs, device):
    """More column tiles than programs: each has several."""
    grid = geometry.grid(*shape, many_programs)
    assert 1 < grid.walkers < grid.tiles
    check(make_inputs(shape, device=device), backend="triton", reduction=reduction, **of_mean)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("of_mean", MEANS)
@pytest.mark.parametrize(
    ("batch", "sums"),
    [(41, 21 + 2), pytest.param(601, 301 + 19 + 2, marks=pytest.mark.slow)],
)
def test_sums_of_several_rounds(batch, sums, of_mean, reduction, device):
    """Groups of ranges, and groups of those."""
    config = geometry.Config(tile=8, max_cols=4, small=0, programs=1000)
    shape = (batch, 4)
    assert partial_sums(geometry.grid(*shape, config).ranges) == sums
    with _plans.use_config(config):
        check(make_inputs(shape, device=device), backend="triton", reduction=reduction, **of_mean)


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
    pair = make_inputs((5, 12), device=device)
    dz = {
        "expanded": torch.randn(()).expand(5, 12),
        "transposed": torch.randn(12, 5).t(),
        "none_strided": torch.randn(5, 24)[:, ::2],
    }[upstream].to(device)
    dkl = torch.randn(10, device=device)[::2] if upstream != "expanded" else dz[:, 0]
    check(pair, backend=backend, reduction="none", upstream=(dz, dkl, None))


SUBSETS = list(itertools.product([True, False], repeat=3))[:-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("storage", "needs"),
    [*((PAIR, needs) for needs in SUBSETS), *((PACKED, n[1:]) for n in SUBSETS if n[0] == n[1])],
    ids=str,
)
def test_every_subset_of_inputs(storage, needs, dtype, backend, many_programs, device):
    tensors = storage.store(*make_inputs((5, 12), dtype=dtype, device=device))
    eps = make_inputs((5, 12), dtype=dtype, device=device, seed=9)[0]
    check(tensors, storage=storage, eps=eps, needs=needs, backend=backend)


@pytest.mark.parametrize("used", SUBSETS)
@pytest.mark.parametrize("clamp", [None, (-0.5, 0.7)])
def test_every_subset_of_outputs(used, clamp, storage, backend, many_programs, device):
    """Every gradient is written whatever it is made of."""
    tensors = storage.store(*make_inputs((5, 12), device=device))
    call = {"seed": SEED, "backend": backend, "clamp": clamp}
    upstream = random_upstream(storage.call(*tensors, **call))
    upstream = [g if u else None for g, u in zip(upstream, used)]
    check(tensors, storage=storage, backend=backend, clamp=clamp, upstream=upstream)


@pytest.mark.parametrize("clamp", [(-0.5, 0.7), (0.2, 3.0), (None, 0.0), (-1.0, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clamp(clamp, dtype, backend, many_programs, device):
    bounds = tuple(
        side if given is None else given
        for given, side in zip(clamp, (-float("inf"), float("inf")))
    )
    mu, logvar = make_inputs((5, 12), dtype=dtype, device=device)
    check((mu, logvar), clamp=bounds, backend=backend)
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
