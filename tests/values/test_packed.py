"""reparameterize_kl_moments: values and gradients against the oracle, and bad input."""

import itertools

import pytest
import torch

import vaekl
from vaekl.reference import SEED_OFFSET, moments_gradient, moments_oracle, normal
from vaekl.testing import (
    KL_BUDGET,
    gradient_bounds,
    kl_of_mean_bound,
    make_inputs,
    worst,
)

SEED = 77
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


def make_moments(shape, *, dtype=torch.float32, layout="contiguous", device="cpu"):
    return make_inputs(shape, dtype=dtype, layout=layout, device=device)[0].requires_grad_()


def run(moments, *, dim, backend, eps=None, seed=SEED, **options):
    """Outputs, random upstream gradients, and the gradients of moments (and eps)."""
    noise = {"eps": eps} if eps is not None else {"seed": seed}
    out = vaekl.reparameterize_kl_moments(moments, dim=dim, backend=backend, **noise, **options)
    torch.manual_seed(1)
    upstream = [None if o is None else torch.randn_like(o) for o in out]
    leaves = [t for t in (moments, eps) if t is not None and t.requires_grad]
    pairs = [(o, g) for o, g in zip(out, upstream) if o is not None and o.requires_grad]
    outputs, gradients = zip(*pairs)
    return out, upstream, torch.autograd.grad(outputs, leaves, gradients)


def check(moments, *, dim, backend, eps=None, **options):
    """Every output and the gradients against the oracle, within the budgets."""
    out, upstream, gradients = run(moments, dim=dim, backend=backend, eps=eps, **options)
    oracle_options = {k: v for k, v in options.items() if k != "kl_of_mean"}
    noise = eps
    if eps is None:
        batch = out.z.shape[: options.get("batch_dims", 1)].numel()
        noise = normal(SEED, SEED_OFFSET, batch, out.z.numel() // batch).reshape(out.z.shape)
    oracle = moments_oracle(moments, noise, dim=dim, **oracle_options)
    dtype = out.kl.dtype
    assert worst(out.kl, oracle.kl, KL_BUDGET[dtype] * oracle.kl) <= 1
    if out.kl_of_mean is not None:
        assert worst(out.kl_of_mean, oracle.kl_of_mean, kl_of_mean_bound(oracle, dtype)) <= 1
    mu, logvar = (t.detach() for t in moments.chunk(2, dim))
    same = vaekl.reparameterize_kl(
        mu, logvar, backend=backend, **({"eps": eps} if eps is not None else {"seed": SEED}),
        **options,
    )  # fmt: skip
    assert torch.equal(out.z, same.z)  # whose own error test_values.py bounds
    expected = oracle.gradients(*upstream)
    bounds = gradient_bounds(oracle, dtype, moments.dtype, *upstream, drawn=eps is None)
    assert gradients[0].dtype == moments.dtype
    exact, bound = (moments_gradient(g, dim) for g in (expected, bounds))
    assert worst(gradients[0], exact, bound) <= 1
    if eps is not None and eps.requires_grad:
        assert worst(gradients[1], expected["deps"], bounds["deps"]) <= 1
    return gradients[0]


@pytest.mark.parametrize(("shape", "dim", "batch_dims"), PLACES)
def test_any_axis(shape, dim, batch_dims, backend, many_programs, device):
    moments = make_moments(shape, device=device)
    gradient = check(moments, dim=dim, batch_dims=batch_dims, backend=backend, reduction="none")
    assert gradient.stride() == moments.stride()


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "halves", "expanded", "steps"])
@pytest.mark.parametrize(("shape", "dim"), [((3, 8), 1), ((2, 4, 2, 4), 1), ((2, 4, 2, 4), -1),
                                            ((2, 4, 2, 2, 2), 1)])  # fmt: skip
def test_layouts(layout, shape, dim, backend, device):
    """The gradient has the strides that torch.empty_like gives: those of moments if dense."""
    pick = 1 if layout == "expanded" else 0
    moments = make_inputs(shape, layout=layout, device=device)[pick].detach().requires_grad_()
    gradient = check(moments, dim=dim, backend=backend)
    assert gradient.stride() == torch.empty_like(moments).stride()


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
@pytest.mark.parametrize("mean_over", ["batch", "all", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options(reduction, mean_over, dtype, backend, many_programs, device):
    moments = make_moments((5, 12), dtype=dtype, device=device)
    check(
        moments, dim=1, backend=backend, reduction=reduction, mean_over=mean_over or "batch",
        kl_of_mean=mean_over is not None, clamp=(-0.5, 0.7),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("needs", [(True, False), (True, True), (False, True)])
def test_eps(dtype, needs, backend, device):
    moments = make_moments((5, 12), dtype=dtype, device=device).requires_grad_(needs[0])
    eps = make_inputs((5, 6), dtype=dtype, device=device, seed=9)[0].requires_grad_(needs[1])
    if needs[0]:
        check(moments, dim=1, backend=backend, eps=eps)
        return
    out, upstream, (deps,) = run(moments, dim=1, backend=backend, eps=eps)
    assert not out.kl.requires_grad
    oracle = moments_oracle(moments, eps)
    expected = oracle.gradients(upstream[0])["deps"]
    bounds = gradient_bounds(oracle, out.kl.dtype, dtype, upstream[0])
    assert worst(deps, expected, bounds["deps"]) <= 1


@pytest.mark.parametrize("used", list(itertools.product([True, False], repeat=3))[:-1])
@pytest.mark.parametrize("clamp", [None, (-0.5, 0.7)])
def test_every_subset_of_outputs(used, clamp, backend, device):
    """Both halves of the gradient are written whatever it is made of."""
    moments = make_moments((5, 12), device=device)
    out = vaekl.reparameterize_kl_moments(moments, seed=SEED, clamp=clamp, backend=backend)
    upstream = [torch.randn_like(o) if u else None for o, u in zip(out, used)]
    pairs = [(o, g) for o, g in zip(out, upstream) if g is not None]
    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    oracle = moments_oracle(moments, normal(SEED, SEED_OFFSET, 5, 6), clamp=clamp)
    bounds = gradient_bounds(oracle, torch.float32, torch.float32, *upstream, drawn=True)
    exact = moments_gradient(oracle.gradients(*upstream))
    assert worst(moments.grad, exact, moments_gradient(bounds)) <= 1


@pytest.mark.parametrize(("shape", "dim"), [((4, 6), 1), ((4, 3), 0), ((2, 4, 3), 1)])
@pytest.mark.parametrize("given", [False, True])
def test_gradcheck(shape, dim, given, backend, device):
    """First and second derivatives in float64."""
    moments = make_moments(shape, dtype=torch.float64, device=device)
    half = moments.detach().chunk(2, dim)[0]
    eps = torch.randn_like(half).requires_grad_()
    inputs = (moments, eps) if given else (moments,)

    def function(moments, eps=None):
        noise = {"seed": 3} if eps is None else {"eps": eps}
        out = vaekl.reparameterize_kl_moments(
            moments, dim=dim, reduction="none", clamp=(-1.0, 0.9), backend=backend, **noise
        )
        return tuple(out)

    fast = backend == "triton"
    assert torch.autograd.gradcheck(function, inputs, atol=1e-7, rtol=1e-6, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-7, fast_mode=True)


@pytest.mark.parametrize(("shape", "dim"), [((4, 6), 1), ((4, 3), 0), ((2, 4, 3), 1)])
def test_create_graph_gives_the_same_gradient(shape, dim, backend, device):
    """The road that can be differentiated again ends in the same place as the kernel."""
    moments = make_moments(shape, dtype=torch.float64, device=device)
    out = vaekl.reparameterize_kl_moments(
        moments, dim=dim, seed=3, clamp=(-1.0, 0.9), backend=backend
    )
    upstream = [torch.randn_like(o) for o in out]
    plain, graph = (
        torch.autograd.grad(out, moments, upstream, retain_graph=True, create_graph=create)[0]
        for create in (False, True)
    )
    assert graph.requires_grad
    torch.testing.assert_close(graph.detach(), plain)


def test_generators_give_what_two_tensors_get(backend, device):
    moments = make_moments((5, 12), device=device)
    pair = [t.detach() for t in moments.chunk(2, 1)]
    for make in (lambda: torch.Generator(device).manual_seed(4), lambda: None):
        draws = []
        for call in (vaekl.reparameterize_kl_moments, vaekl.reparameterize_kl):
            torch.manual_seed(4)
            inputs = [moments] if call is vaekl.reparameterize_kl_moments else pair
            draws.append(call(*inputs, generator=make(), backend=backend).z.detach())
        assert torch.equal(*draws)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 6, 2)])
def test_nothing_in(shape, backend, device):
    moments = make_moments(shape, device=device)
    out = vaekl.reparameterize_kl_moments(moments, backend=backend, reduction="sum")
    assert out.kl == 0
    (out.z.sum() + out.kl).backward()
    assert moments.grad.shape == shape


GOOD = torch.zeros(4, 6)
BAD_CALLS = {
    "no tensor": (dict(moments=[1.0]), TypeError, r"moments must be a torch\.Tensor, got list"),
    "dtype": (dict(moments=GOOD.long()), TypeError, "moments must have one of the dtypes .*int64"),
    "odd size": (
        dict(moments=GOOD[:, :5]), ValueError,
        r"moments must have an even size along dim=1, .*; got 5 \(shape \(4, 5\)\)",
    ),
    "odd size from the end": (dict(moments=GOOD[:3], dim=-2), ValueError, "even size .*dim=-2.* 3"),
    "scalar": (dict(moments=GOOD[0, 0]), ValueError, "moments must have an axis .*shape"),
    "dim high": (dict(dim=2), ValueError, r"dim must be in \[-2, 1\] .*\(4, 6\)\); got 2"),
    "dim low": (dict(dim=-3), ValueError, r"dim must be in \[-2, 1\]"),
    "dim default": (dict(moments=GOOD[0]), ValueError, r"dim must be in \[-1, 0\] .*; got 1"),
    "dim type": (dict(dim=1.0), TypeError, "dim must be an int, got float"),
    "dim bool": (dict(dim=True), TypeError, "dim must be an int, got bool"),
    "batch_dims": (dict(batch_dims=3), ValueError, r"batch_dims must be in \[0, 2\] .*; got 3"),
    "batch_dims type": (dict(batch_dims="1"), TypeError, "batch_dims must be an int, got str"),
    "eps shape": (
        dict(eps=GOOD), ValueError, r"eps must have the shape of mu, \(4, 3\); got \(4, 6\)",
    ),
    "two noises": (dict(eps=GOOD[:, :3], seed=1), ValueError, "at most one .* eps and seed"),
    "reduction": (dict(reduction="avg"), ValueError, "reduction must be one of"),
    "mean_over": (dict(mean_over="rows"), ValueError, "mean_over must be one of"),
    "kl_of_mean": (dict(kl_of_mean=1), TypeError, "kl_of_mean must be a bool"),
    "clamp": (dict(clamp=(1.0, 0.0)), ValueError, "clamp needs lo <= hi"),
    "backend": (dict(backend="cuda"), ValueError, "backend must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD_CALLS))
def test_bad_input(case):
    arguments, error, message = BAD_CALLS[case]
    arguments = {"moments": GOOD, **arguments}
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        vaekl.reparameterize_kl_moments(arguments.pop("moments"), **arguments)
    assert torch.equal(torch.get_rng_state(), before)
