"""torch.autograd.gradcheck in float64, through every backend."""

import itertools

import pytest
import torch

import vaekl
from storages import PAIR, Packed
from vaekl import _plans
from vaekl.backends import layout as geometry
from vaekl.testing import make_inputs, random_upstream

OUTPUTS = ("z", "kl", "kl_of_mean")
REDUCTIONS = ("none", "sum", "batchmean", "mean", "per_dim")


def gradcheck(function, inputs, backend, **options):
    """Numerical against analytical Jacobians, entry by entry; random projections of both where the
    interpreter would take minutes."""
    fast = {"fast_mode": backend == "triton"}
    assert torch.autograd.gradcheck(
        function, inputs, eps=1e-6, atol=1e-7, rtol=1e-6, **fast | options
    )


def inputs(shape, device, needs=(True, True, True)):
    """mu, logvar, eps."""
    mu, logvar = make_inputs(shape, dtype=torch.float64, device=device)
    eps = make_inputs(shape, dtype=torch.float64, device=device, seed=5)[0]
    return [t.requires_grad_(need) for t, need in zip((mu, logvar, eps), needs)]


def call(mu, logvar, eps=None, *, outputs=OUTPUTS, **options):
    noise = {"eps": eps} if eps is not None else {"seed": 11}
    out = vaekl.reparameterize_kl(mu, logvar, **noise, **options)
    chosen = [getattr(out, name) for name in outputs]
    return tuple(o for o in chosen if o is not None and o.requires_grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mean_over", ["batch", "all", None])
def test_reductions(reduction, mean_over, backend, many_programs, device):
    mu, logvar, _ = inputs((5, 9), device)
    assert geometry.grid(5, 9, many_programs)[:2] == (2, 2)
    options = {"reduction": reduction, "kl_of_mean": mean_over is not None, "backend": backend}
    gradcheck(
        lambda m, v: call(m, v, mean_over=mean_over or "batch", **options), (mu, logvar), backend,
        check_undefined_grad=backend != "triton",  # test_outputs_used does; minutes here
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_whole_jacobian_through_triton(reduction, device):
    """Not only projections: every entry, small blocks, several programs along both axes."""
    mu, logvar, _ = inputs((2, 5), device)
    smallest = geometry.Config(tile=4, max_cols=4, small=0, programs=4)
    with _plans.use_config(smallest):
        assert geometry.grid(2, 5, smallest)[:2] == (2, 2)
        gradcheck(
            lambda m, v: call(m, v, reduction=reduction, backend="triton"), (mu, logvar), "triton",
            fast_mode=False, check_undefined_grad=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    "outputs", [c for n in (1, 2, 3) for c in itertools.combinations(OUTPUTS, n)]
)
def test_outputs_used(outputs, backend, many_programs, device):
    mu, logvar, _ = inputs((5, 6), device)
    gradcheck(lambda m, v: call(m, v, outputs=outputs, backend=backend), (mu, logvar), backend)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3))[:-1])
def test_inputs_needed(needs, backend, many_programs, device):
    gradcheck(lambda *t: call(*t, backend=backend), tuple(inputs((5, 6), device, needs)), backend)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3))[:-1])
@pytest.mark.parametrize(
    "outputs", [c for n in (1, 2, 3) for c in itertools.combinations(OUTPUTS, n)]
)
def test_every_pairing_of_outputs_and_inputs(outputs, needs, backend, device):
    tensors = tuple(inputs((3, 5), device, needs))
    if not call(*tensors, outputs=outputs, backend=backend):
        assert needs == (False, False, True)  # eps reaches z alone: nothing to check
        return
    gradcheck(lambda *t: call(*t, outputs=outputs, backend=backend), tensors, backend)


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1), (4, 5), (9, 13)])
@pytest.mark.parametrize("given", [False, True])
def test_shapes(shape, given, backend, many_programs, device):
    mu, logvar, eps = inputs(shape, device)
    tensors = (mu, logvar, eps) if given else (mu, logvar)
    gradcheck(lambda *t: call(*t, backend=backend), tensors, backend)


@pytest.mark.parametrize("mean_over", ["batch", "all"])
def test_clamp(mean_over, backend, many_programs, device):
    mu, logvar, eps = inputs((5, 6), device)
    inside = (logvar.detach() > -0.8) & (logvar.detach() < 0.6)
    assert inside.any()
    assert not inside.all()
    options = {"clamp": (-0.8, 0.6), "mean_over": mean_over, "backend": backend}
    gradcheck(lambda *t: call(*t, **options), (mu, logvar, eps), backend)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_batch_axes(reduction, backend, many_programs, device):
    mu, logvar, _ = inputs((2, 3, 5), device)
    options = {"batch_dims": 2, "reduction": reduction, "backend": backend}
    gradcheck(lambda m, v: call(m, v, **options), (mu, logvar), backend)


def test_halves_of_one_tensor(backend, many_programs, device):
    packed = make_inputs((5, 12), dtype=torch.float64, device=device)[0].requires_grad_()
    gradcheck(lambda p: call(p[:, :6], p[:, 6:], backend=backend), (packed,), backend)
    gradcheck(lambda p: call(p[:, ::2], p[:, 1::2], backend=backend), (packed,), backend)


@pytest.mark.parametrize("axis", [0, 1])
def test_expanded_logvar(axis, backend, many_programs, device):
    mu, logvar, _ = inputs((5, 6), device)
    one = logvar.detach().narrow(axis, 0, 1).clone().requires_grad_()
    gradcheck(lambda m, v: call(m, v.expand(5, 6), backend=backend), (mu, one), backend)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, v, b: vaekl.reparameterize(m, v, seed=1, backend=b),
        lambda m, v, b: vaekl.kl_loss(m, v, backend=b),
        lambda m, v, b: vaekl.kl_of_mean(m, v, backend=b),
    ],
    ids=["reparameterize", "kl_loss", "kl_of_mean"],
)
def test_single_functions(function, backend, many_programs, device):
    mu, logvar, _ = inputs((5, 6), device)
    gradcheck(lambda m, v: function(m, v, backend), (mu, logvar), backend)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mean_over", ["batch", "all"])
@pytest.mark.parametrize("given", [False, True])
def test_double_backward(reduction, mean_over, given, backend, many_programs, device):
    """Second derivatives, of every output and for drawn noise too; clamp included."""
    tensors = tuple(inputs((4, 3), device))[: 3 if given else 2]
    options = {"reduction": reduction, "mean_over": mean_over, "backend": backend}
    assert torch.autograd.gradgradcheck(
        lambda *t: call(*t, clamp=(-1.0, 0.9), **options), tensors, atol=1e-7, fast_mode=True
    )


@pytest.mark.parametrize(("shape", "dim"), [((4, 6), 1), ((4, 3), 0), ((2, 4, 3), 1)])
@pytest.mark.parametrize("given", [False, True])
def test_moments(shape, dim, given, backend, device):
    """First and second derivatives."""
    moments = make_inputs(shape, dtype=torch.float64, device=device)[0].requires_grad_()
    eps = torch.randn_like(moments.detach().chunk(2, dim)[0]).requires_grad_()
    tensors = (moments, eps) if given else (moments,)

    def function(moments, eps=None):
        options = {"seed": 3} if eps is None else {}
        return Packed(dim).call(
            moments, eps, reduction="none", clamp=(-1.0, 0.9), backend=backend, **options
        )

    gradcheck(function, tensors, backend)
    assert torch.autograd.gradgradcheck(function, tensors, atol=1e-7, fast_mode=True)


@pytest.mark.parametrize(
    ("storage", "shape"),
    [(PAIR, (4, 6)), (Packed(1), (4, 6)), (Packed(0), (4, 3)), (Packed(1), (2, 4, 3))],
    ids=str,
)
def test_create_graph_gives_the_same_gradient(storage, shape, backend, device):
    """The road that can be differentiated again ends in the same place as the kernel."""
    mu, logvar = make_inputs(shape, dtype=torch.float64, device=device)
    tensors = [t.requires_grad_() for t in ((mu, logvar) if storage is PAIR else (mu,))]
    out = storage.call(*tensors, seed=3, clamp=(-1.0, 0.9), backend=backend)
    upstream = random_upstream(out)
    plain, graph = (
        torch.autograd.grad(out, tensors, upstream, retain_graph=True, create_graph=create)
        for create in (False, True)
    )
    for a, b in zip(graph, plain):
        assert a.requires_grad
        torch.testing.assert_close(a.detach(), b)


def test_gradient_penalty_is_not_dropped(backend, device):
    """The silent failure of a once-differentiable function: no second-order term at all."""
    mu, logvar, _ = inputs((4, 3), device)
    kl = vaekl.kl_loss(mu, logvar, reduction="sum", backend=backend)
    (gradient,) = torch.autograd.grad(kl, logvar, create_graph=True)
    gradient.sum().backward()
    torch.testing.assert_close(logvar.grad, 0.5 * logvar.detach().exp())
