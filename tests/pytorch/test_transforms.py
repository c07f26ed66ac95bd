"""torch.func and forward-mode AD: equal to plain torch code under the same transform."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import vaekl
from vaekl.reference import torch_reparameterize_kl
from vaekl.testing import make_inputs

REDUCTIONS = ("none", "sum", "batchmean", "mean", "per_dim")
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def tensors(device):
    """mu, logvar, eps: float64, with a logvar on both sides of |l| = 1, of a clamp, and near 0."""
    mu, logvar = make_inputs((5, 6), dtype=torch.float64, device=device)
    logvar = logvar * torch.tensor([2.0, 1.0, 1.0, 1e-3, 1e-6, 1.0], device=device).double()
    return mu, logvar, make_inputs((5, 6), dtype=torch.float64, device=device, seed=5)[0]


def ours(backend, **options):
    def loss(mu, logvar, eps):
        return tuple(vaekl.reparameterize_kl(mu, logvar, eps=eps, backend=backend, **options))

    return loss


def plain(**options):
    return lambda mu, logvar, eps: tuple(torch_reparameterize_kl(mu, logvar, eps, **options))


def same(actual, expected, **close):
    actual, expected = (torch.utils._pytree.tree_leaves(t) for t in (actual, expected))
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, **(close or CLOSE))


def weighted(function):
    """A scalar of every output, each element with a weight of its own."""

    def total(*inputs):
        total = 0.0
        for out in function(*inputs):
            weights = torch.arange(1.0, out.numel() + 1, dtype=out.dtype, device=out.device).sin()
            total = total + (weights.reshape(out.shape) * out.sin()).sum()
        return total

    return total


@pytest.mark.parametrize("mean_over", ["batch", "all"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_grad(reduction, mean_over, backend, tensors):
    options = {"reduction": reduction, "mean_over": mean_over, "clamp": (-1.5, 1.2)}
    every = {"argnums": (0, 1, 2)}
    actual = grad(weighted(ours(backend, **options)), **every)(*tensors)
    same(actual, grad(weighted(plain(**options)), **every)(*tensors))


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
@pytest.mark.parametrize("reduction", ["none", "per_dim"])
def test_jacobians(jacobian, reduction, backend, tensors):
    every = {"argnums": (0, 1, 2)}
    actual = jacobian(ours(backend, reduction=reduction), **every)(*tensors)
    same(actual, jacobian(plain(reduction=reduction), **every)(*tensors))


def test_jvp_and_vjp(backend, tensors):
    tangents = tuple(torch.randn_like(t) for t in tensors)
    same(jvp(ours(backend), tensors, tangents), jvp(plain(), tensors, tangents))
    results, pull = vjp(ours(backend), *tensors)
    upstream = tuple(torch.randn_like(out) for out in results)
    same(pull(upstream), vjp(plain(), *tensors)[1](upstream))


def test_hessian(backend, tensors):
    """Forward over reverse; the plain formula is right to 1e-10 in float64 at these scales."""
    arguments = {"argnums": (0, 1)}
    actual = hessian(weighted(ours(backend)), **arguments)(*tensors)
    same(actual, hessian(weighted(plain()), **arguments)(*tensors))


def test_third_derivatives_near_and_far_from_zero(device):
    """Of phi: e^l at every order, on both sides of the seam, and no NaN where one side is inf."""
    logvar = torch.tensor([-1e30, -800.0, -2.0, -1.0, -1e-9, 0.0, 1e-9, 1.0, 1.0001, 20.0])
    logvar = logvar.double().to(device)
    kl = lambda v: vaekl.kl_loss(torch.zeros_like(v)[None], v[None])  # noqa: E731
    first = grad(lambda v: kl(v).sum())
    second = grad(lambda v: first(v).sum())
    third = grad(lambda v: second(v).sum())
    same(first(logvar), 0.5 * logvar.expm1(), rtol=1e-14, atol=1e-300)
    same(second(logvar), 0.5 * logvar.exp(), rtol=1e-14, atol=1e-300)
    # What is left out of the series, differentiated three times, is 1 / 16! at the seam.
    same(third(logvar), 0.5 * logvar.exp(), rtol=3e-13, atol=1e-300)


def test_float32_keeps_its_digits_near_collapse(device):
    """Under a transform too: the budget of vaekl.testing, where plain float32 has no digit left."""
    mu, logvar = make_inputs((4, 64), scale=1e-4, device=device)
    wide = logvar.double()
    kl = vmap(lambda m, v: vaekl.kl_loss(m, v, batch_dims=0))(torch.zeros_like(mu), logvar)
    oracle = vaekl.kl_loss(torch.zeros_like(wide), wide, reduction="none")
    torch.testing.assert_close(kl.double(), oracle, rtol=5e-7, atol=0)
    slope = grad(lambda v: vaekl.kl_loss(torch.zeros_like(v), v, reduction="sum"))(logvar)
    torch.testing.assert_close(slope.double(), 0.5 * wide.expm1(), rtol=5e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("logvar_dtype", [torch.bfloat16, torch.float32])
def test_dtypes(dtype, logvar_dtype, backend, device):
    """Those of a plain call: z as torch promotes, both KLs float32; values within rounding."""
    mu, logvar = make_inputs((5, 6), dtype=dtype, logvar_dtype=logvar_dtype, device=device)
    call = lambda m, v: tuple(  # noqa: E731
        vaekl.reparameterize_kl(m, v, seed=3, backend=backend)
    )
    expected = call(mu, logvar)
    actual = vmap(call)(mu[None], logvar[None])
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a[0], b)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, 0), (None, None, 0)])
def test_vmap_of_any_axis(in_dims, backend, device):
    """Also over some of the inputs alone."""
    rows = [make_inputs((3, 4, 5), dtype=torch.float64, device=device, seed=s)[0] for s in range(3)]
    inputs = [t[0] if axis is None else t.movedim(0, axis) for t, axis in zip(rows, in_dims)]
    for options in ({}, {"reduction": "none", "mean_over": "all", "clamp": (-0.5, 0.5)}):
        actual = vmap(ours(backend, **options), in_dims)(*inputs)
        same(actual, vmap(plain(**options), in_dims)(*inputs))
        alone = vmap(lambda m, v, e: vaekl.reparameterize(m, v, eps=e, backend=backend), in_dims)
        same(alone(*inputs), vmap(lambda m, v, e: m + (0.5 * v).exp() * e, in_dims)(*inputs))


def test_gradients_of_each_sample(backend, device):
    """vmap(grad) over the weights of an encoder, against a loop over samples."""
    torch.manual_seed(0)
    encoder = torch.nn.Linear(4, 6, dtype=torch.float64, device=device)
    images = torch.randn(7, 4, dtype=torch.float64, device=device)
    eps = torch.randn(7, 3, dtype=torch.float64, device=device)
    weights = {name: p.detach() for name, p in encoder.named_parameters()}

    def loss(weights, image, eps, function):
        mu, logvar = functional_call(encoder, weights, (image[None],)).chunk(2, dim=-1)
        z, kl, _ = function(mu, logvar, eps[None])
        return z.sin().sum() + kl

    each = vmap(grad(loss), (None, 0, 0, None))(weights, images, eps, ours(backend))
    for i in range(7):
        one = grad(loss)(weights, images[i], eps[i], plain())
        same({name: g[i] for name, g in each.items()}, one)


def draws(count, randomness, backend, device, **noise):
    """z of `count` samples with mu = 0 and logvar = 0: their noise."""
    zeros = torch.zeros(count, 2, 3, device=device)
    call = lambda m: vaekl.reparameterize(m, torch.zeros_like(m), backend=backend, **noise)  # noqa: E731
    return vmap(call, randomness=randomness)(zeros)


def test_vmap_randomness(backend, device):
    """As torch.randn: an error unless asked for; the same for all samples, or for each its own."""
    with pytest.raises(RuntimeError, match="randomness error mode"):
        draws(4, "error", backend, device)
    alike = draws(4, "same", backend, device)
    assert torch.equal(alike, alike[:1].expand_as(alike))
    assert len(alike[0].unique()) == 6
    assert len(draws(4, "different", backend, device).unique()) == 24
    for randomness in ("same", "different"):
        runs = []
        for _ in range(2):
            torch.manual_seed(5)
            runs.append(draws(4, randomness, backend, device))
        assert torch.equal(*runs)
        assert not torch.equal(runs[0], draws(4, randomness, backend, device))
        generator = torch.Generator(device).manual_seed(5)
        before = torch.get_rng_state()
        runs = [draws(4, randomness, backend, device, generator=generator) for _ in range(2)]
        assert not torch.equal(*runs)
        assert torch.equal(torch.get_rng_state(), before)


def test_vmap_randomness_without_a_batched_tensor(backend, device):
    """The noise is asked for by vmap, not by what it maps over."""
    zeros = torch.zeros(2, 3, device=device)
    call = lambda x: vaekl.reparameterize(zeros, zeros, backend=backend) + x  # noqa: E731
    steps = torch.zeros(4, device=device)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(call)(steps)
    assert len(vmap(call, randomness="different")(steps).unique()) == 24
    assert len(vmap(call, randomness="same")(steps).unique()) == 6


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_a_seed_is_the_same_for_every_sample_of_vmap(randomness, backend, device):
    """Its noise depends on (seed, b, j) alone; b counts within a sample of vmap."""
    noise = draws(4, randomness, backend, device, seed=9)
    zeros = torch.zeros(2, 3, device=device)
    one = vaekl.reparameterize(zeros, zeros, seed=9, backend=backend)
    torch.testing.assert_close(noise, one.expand_as(noise), rtol=0, atol=2e-6)


@pytest.mark.parametrize("noise", ["default", "generator", "seed"])
def test_noise_under_grad_is_that_of_a_plain_call(noise, backend, device):
    """The same draws from the same state, under every transform but vmap."""
    mu, logvar = make_inputs((4, 3), dtype=torch.float64, device=device)
    states = []

    def run(call):
        torch.manual_seed(5)
        generator = torch.Generator(device).manual_seed(6)
        given = {"default": {}, "generator": {"generator": generator}, "seed": {"seed": 7}}[noise]
        result = call(lambda v: vaekl.reparameterize(mu, v, backend=backend, **given).sin().sum())
        default = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
        states.append((default, generator.get_state()))
        return result

    leaf = logvar.clone().requires_grad_()
    expected = run(lambda f: torch.autograd.grad(f(leaf), leaf)[0])
    same(run(lambda f: grad(f)(logvar)), expected)
    tangent = torch.randn_like(logvar)
    same(run(lambda f: jvp(f, (logvar,), (tangent,))[1]), (expected * tangent).sum())
    for state in states[1:]:
        assert all(torch.equal(one, other) for one, other in zip(state, states[0]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dual_numbers(reduction, backend, tensors):
    tangents = [torch.randn_like(t) for t in tensors]
    found = []
    for function in (ours(backend, reduction=reduction), plain(reduction=reduction)):
        with forward_ad.dual_level():
            out = function(*map(forward_ad.make_dual, tensors, tangents))
            found.append([tuple(forward_ad.unpack_dual(o)) for o in out])
    same(*found)


def test_tangents_of_upstream_gradients(backend, tensors):
    """Reverse mode first, forward mode through it: a kernel would drop the tangent."""
    mu, logvar, eps = (t.clone().requires_grad_() for t in tensors)
    found = []
    tangent = torch.randn(5, 6, dtype=torch.float64).to(mu.device)
    for function in (ours(backend), plain()):
        z = function(mu, logvar, eps)[0]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones_like(z), tangent)
            (dlogvar,) = torch.autograd.grad(z, logvar, dual)
            found.append(tuple(forward_ad.unpack_dual(dlogvar)))
    same(*found)


def test_torch_checks_every_mode(backend, tensors):
    """gradcheck of forward mode, and of both modes batched."""
    leaves = [t[:3, :2].clone().requires_grad_() for t in tensors]
    modes = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(
        ours(backend), leaves, **modes, check_batched_forward_grad=True, atol=1e-7
    )
    assert torch.autograd.gradgradcheck(
        ours(backend), leaves, check_fwd_over_rev=True, check_batched_grad=True, atol=1e-7
    )


def test_batched_upstream_gradients(backend, tensors):
    """is_grads_batched of torch.autograd.grad; what torch.autograd.functional vectorises with."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    found = []
    for function in (ours(backend, reduction="none"), plain(reduction="none")):
        outputs = function(*leaves)
        rows = [
            torch.arange(3.0 * out.numel()).sin().reshape(3, *out.shape).to(out) for out in outputs
        ]
        options = {"is_grads_batched": True, "retain_graph": True, "allow_unused": True}
        found.append(torch.autograd.grad(outputs, leaves, rows, **options))
        for out, batch in zip(outputs, rows):
            found[-1] += torch.autograd.grad(out, leaves, batch, **options)
    assert all((a is None) == (b is None) for a, b in zip(*found))
    same(*found)


def test_batched_upstream_gradients_of_drawn_noise(storage, backend, device):
    tensors = [t.requires_grad_() for t in storage.store(*make_inputs((4, 3), device=device))]
    z = storage.call(*tensors, seed=3, backend=backend).z
    rows = torch.eye(12, device=device).reshape(12, 4, 3)
    together = torch.autograd.grad(z, tensors, rows, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(z, tensors, row, retain_graph=True) for row in rows]
    for stacked, *each in zip(together, *alone):
        torch.testing.assert_close(stacked, torch.stack(each))


@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jvp", "hessian"])
def test_transforms_see_two_views(transform, backend, device):
    """torch.func gets of packed moments what it gets of their halves."""
    moments = make_inputs((3, 4, 6), dtype=torch.float64, device=device)[0]

    def loss(call):
        def function(m):
            z, kl, of_mean = call(m)
            return z.square().sum() + kl + of_mean

        return function

    options = {"seed": 3, "backend": backend}
    packed = loss(lambda m: vaekl.reparameterize_kl_moments(m, **options))
    pair = loss(lambda m: vaekl.reparameterize_kl(*m.chunk(2, 1), **options))
    func = torch.func
    apply = {
        "grad": lambda f: func.grad(f)(moments[0]),
        "vmap of grad": lambda f: func.vmap(func.grad(f))(moments),
        "jvp": lambda f: func.jvp(f, (moments[0],), (torch.ones_like(moments[0]),))[1],
        "hessian": lambda f: func.hessian(f)(moments[0]),
    }[transform]
    torch.testing.assert_close(apply(packed), apply(pair))


def test_transforms_reach_the_module(backend, tensors):
    module = vaekl.nn.ReparameterizeKL(backend=backend)
    mu, logvar, eps = tensors
    actual = grad(lambda m: module(m, logvar, eps=eps).kl)(mu)
    same(actual, mu / len(mu))
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(lambda m: module(m, torch.zeros_like(m)).z)(mu[:, None])


def test_gradients_far_from_zero(backend, device):
    """Where the series that is not taken would overflow."""
    mu = torch.zeros(1, 3, device=device)
    logvar = torch.tensor([[-1e4, -50.0, 1.0]], device=device)
    loss = lambda v: vaekl.kl_loss(mu, v, backend=backend)  # noqa: E731
    expected = 0.5 * torch.expm1(logvar)
    torch.testing.assert_close(torch.func.grad(loss)(logvar), expected)
