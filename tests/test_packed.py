"""reparameterize_kl_moments: the results of reparameterize_kl, one gradient tensor, no copies."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vaekl
from vaekl.reference import moments_gradient, moments_oracle, normal
from vaekl.testing import (
    KL_BUDGET,
    gradient_bounds,
    kl_of_mean_bound,
    large_operators,
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
        noise = normal(SEED, 0, batch, out.z.numel() // batch).reshape(out.z.shape)
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
    oracle = moments_oracle(moments, normal(SEED, 0, 5, 6), clamp=clamp)
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


# What joining or taking apart gradients, or copying, would show as; on scalars they are harmless.
MOVES = {"cat", "chunk", "split", "split_with_sizes", "copy_", "clone", "contiguous", "zeros",
         "zero_", "slice_backward", "narrow_backward", "select_backward"}  # fmt: skip


def in_place_moments(device):
    """(moments, dim, batch_dims) that are promised to be read in place."""
    yield torch.randn(8, 64, device=device), 1, 1
    yield torch.randn(8, 80, device=device)[:, 10:74], 1, 1
    yield torch.randn(8, 6, device=device), 0, 1
    yield torch.randn(2, 8, 4, 4, device=device), 1, 1
    yield torch.randn(2, 8, 4, 4, device=device).to(memory_format=torch.channels_last), 1, 1
    video = torch.randn(2, 8, 3, 4, 4, device=device)
    yield video, 1, 1
    yield video.to(memory_format=torch.channels_last_3d), 1, 1
    yield torch.randn(3, 4, 16, device=device), -1, 2
    yield torch.randn(3, 4, 16, device=device), -1, 1
    yield torch.randn(16, 4, 3, device=device).permute(2, 1, 0), 2, 1


def test_no_copies_and_one_gradient(backend, device, launches_thrown_away):
    """Operators on tensors as large as one half, by torch's profiler, forward and backward.

    The profiler's list is of the path that users take (no dispatch mode is active), and its
    allocations are counted: z, and one gradient of the size of moments. The eager backend has
    temporaries, each the size of a half, and copies nothing either.
    """
    for moments, dim, batch_dims in in_place_moments(device):
        moments = moments.detach().requires_grad_()
        half = moments.numel() // 2
        dz = torch.randn_like(moments.detach().narrow(dim, 0, moments.shape[dim] // 2))
        one = torch.ones((), device=device)

        def step(moments=moments, dim=dim, batch_dims=batch_dims, dz=dz, one=one):
            z, kl, _ = vaekl.reparameterize_kl_moments(
                moments, dim=dim, batch_dims=batch_dims, kl_of_mean=False, backend=backend
            )
            return z, torch.autograd.grad([z, kl], moments, [dz, one])[0]

        step()  # a first call plans and compiles
        found = large_operators(step, half)
        assert not MOVES & {name for name, _ in found}, (backend, moments.shape, dim, found)
        sizes = [allocated for _, allocated in found if allocated]
        assert sizes.count(moments.numel() * 4) == 1
        if backend != "eager":
            assert sorted(sizes) == [half * 4, moments.numel() * 4]


def test_the_count_sees_what_halves_cost_otherwise(backend, device, launches_thrown_away):
    """The check above, on chunk and two gradients: it does find the cat."""
    moments = torch.randn(8, 64, device=device, requires_grad=True)

    def step():
        z, _, _ = vaekl.reparameterize_kl(*moments.chunk(2, 1), kl_of_mean=False, backend=backend)
        return torch.autograd.grad(z, moments, torch.ones_like(z))

    step()
    names = {name for name, _ in large_operators(step, moments.numel() // 2)}
    assert {"chunk", "cat"} <= names


def test_kept_for_backward(backend, device):
    """moments by reference, not its halves; the key (eager: the noise) and two mean vectors."""
    moments = make_moments((5, 12), device=device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vaekl.reparameterize_kl_moments(moments, backend=backend)
    own = [t for t in kept if t.data_ptr() == moments.data_ptr()]
    assert [t.shape for t in own] == [moments.shape]
    others = sorted(t.numel() for t in kept if t.data_ptr() != moments.data_ptr())
    assert others == ([12, 30] if backend == "eager" else [2, 12])


def test_a_write_before_backward_is_an_error(backend, device):
    moments = make_moments((5, 12), device=device)
    inner = moments * 1.0
    kl = vaekl.reparameterize_kl_moments(inner, backend=backend).kl
    with torch.no_grad():
        inner[0, 0] = 3.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kl.backward()


class Seen(TorchDispatchMode):
    """Remembers the operators that pass."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("given", [False, True])
def test_a_dispatch_mode_sees_the_operators(given, backend, device):
    moments = make_moments((2, 4, 3), device=device)
    eps = torch.ones(2, 2, 3, device=device, requires_grad=True) if given else None
    direct = run(moments, dim=1, backend=backend, eps=eps)
    with Seen() as seen:
        through = run(moments, dim=1, backend=backend, eps=eps)
    assert "vaekl.reparameterize_kl_moments.default" in seen.names
    assert "vaekl.reparameterize_kl_moments_backward.default" in seen.names
    for a, b in zip((*direct[0], *direct[2]), (*through[0], *through[2])):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "steps"])
@pytest.mark.parametrize("given", [False, True])
def test_opcheck(layout, given, backend, device):
    moments = make_inputs((2, 4, 2, 4), layout=layout, device=device)[0]
    eps = torch.randn(2, 2, 2, 4, device=device) if given else None
    options = ("none", "batch", True, 1, [-1.0, 1.0])
    seed = None if given else 7
    forward = torch.ops.vaekl.reparameterize_kl_moments.default
    arguments = (moments, 1, eps, None, seed, *options, backend)
    torch.library.opcheck(forward, arguments, test_utils=("test_schema", "test_faketensor"))
    z, kl, kl_of_mean, state, means = forward(*arguments)
    upstream = [torch.randn_like(out) for out in (z, kl, kl_of_mean)]
    torch.library.opcheck(
        torch.ops.vaekl.reparameterize_kl_moments_backward.default,
        (moments, 1, eps, *upstream, state, means, *options, backend, [True, given]),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_meta_tensors(backend):
    moments = torch.empty(4, 6, device="meta", dtype=torch.bfloat16, requires_grad=True)
    z, kl, _ = vaekl.reparameterize_kl_moments(moments, backend=backend)
    assert (z.shape, z.dtype, kl.dtype) == ((4, 3), torch.bfloat16, torch.float32)
    (z.sum() + kl).backward()
    assert moments.grad.is_meta


def test_compiled_graph_holds_the_operator(device):
    """One graph; its backward is the packed operator, with no cat of two gradients."""
    names = []

    def compiler(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def function(moments):
        z, kl, _ = vaekl.reparameterize_kl_moments(moments, seed=3, backend="eager")
        return z.square().sum() + kl

    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_compiler

    backend = aot_autograd(fw_compiler=make_boxed_compiler(compiler))
    moments = make_moments((4, 6), device=device)
    loss = torch.compile(function, backend=backend, fullgraph=True)(moments)
    (gradient,) = torch.autograd.grad(loss, moments)
    expected = torch.autograd.grad(function(moments), moments)[0]
    assert torch.equal(gradient, expected)
    assert "vaekl.reparameterize_kl_moments_backward.default" in names
    assert not any("cat" in name for name in names)


@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jvp", "hessian"])
def test_transforms_see_two_views(transform, backend, device, forward_mode):
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


def test_batched_gradients(backend, device):
    """is_grads_batched of torch.autograd.grad, which hands backward a tensor for many."""
    moments = make_moments((4, 6), device=device)
    z = vaekl.reparameterize_kl_moments(moments, seed=3, backend=backend).z
    rows = torch.eye(12, device=device).reshape(12, 4, 3)
    (together,) = torch.autograd.grad(z, moments, rows, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(z, moments, row, retain_graph=True)[0] for row in rows]
    torch.testing.assert_close(together, torch.stack(alone))
