"""reparameterize_kl_moments and the rest of PyTorch: its operators, torch.compile, torch.func."""

import pytest
import torch

import vaekl
from vaekl.testing import make_inputs


@pytest.mark.parametrize("given", [False, True])
def test_a_dispatch_mode_sees_the_operators(given, backend, device, operators):
    moments = make_inputs((2, 4, 3), device=device)[0].requires_grad_()
    eps = torch.ones(2, 2, 3, device=device, requires_grad=True) if given else None

    def call():
        noise = {"seed": 77} if eps is None else {"eps": eps}
        out = vaekl.reparameterize_kl_moments(moments, backend=backend, **noise)
        leaves = [moments] if eps is None else [moments, eps]
        torch.manual_seed(1)
        return (*out, *torch.autograd.grad(out, leaves, [torch.randn_like(o) for o in out]))

    direct = call()
    with operators:
        through = call()
    assert "vaekl.reparameterize_kl_moments.default" in operators.names
    assert "vaekl.reparameterize_kl_moments_backward.default" in operators.names
    for a, b in zip(direct, through):
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
    moments = make_inputs((4, 6), device=device)[0].requires_grad_()
    loss = torch.compile(function, backend=backend, fullgraph=True)(moments)
    (gradient,) = torch.autograd.grad(loss, moments)
    expected = torch.autograd.grad(function(moments), moments)[0]
    assert torch.equal(gradient, expected)
    assert "vaekl.reparameterize_kl_moments_backward.default" in names
    assert not any("cat" in name for name in names)


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


def test_batched_gradients(backend, device):
    """is_grads_batched of torch.autograd.grad, which hands backward a tensor for many."""
    moments = make_inputs((4, 6), device=device)[0].requires_grad_()
    z = vaekl.reparameterize_kl_moments(moments, seed=3, backend=backend).z
    rows = torch.eye(12, device=device).reshape(12, 4, 3)
    (together,) = torch.autograd.grad(z, moments, rows, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(z, moments, row, retain_graph=True)[0] for row in rows]
    torch.testing.assert_close(together, torch.stack(alone))
