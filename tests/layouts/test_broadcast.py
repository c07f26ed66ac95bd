"""logvar and eps that broadcast against mu, as plain code takes them: values, dtypes, gradients."""

import numpy as np
import pytest
import torch

import vaekl
from vaekl.reference import Oracle, to_numpy, torch_reparameterize_kl
from vaekl.testing import KL_BUDGET, gradient_bounds, make_inputs, step, unit, worst

SHAPES = [(), (4,), (1, 4), (3, 1), (1, 1), (5, 1, 1), (1, 3, 4), (5, 3, 1), (5, 1, 4)]


def small(shape, dtype, device, seed=3):
    """A leaf of a few values, within a collapse as often as not."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (0.3 * values).to(device, dtype).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_shape_that_broadcasts(shape, dtype, backend, many_programs, device):
    """The gradient of the small tensor has its shape: the sum over what it stands for."""
    mu = make_inputs((5, 3, 4), dtype=dtype, device=device)[0]
    logvar, eps = small(shape, dtype, device), small(shape, dtype, device, seed=4)
    options = {"reduction": "none", "batch_dims": 2}
    out, upstream, (dmu, dlogvar, deps) = step(
        lambda m, v, e: vaekl.reparameterize_kl(m, v, eps=e, backend=backend, **options),
        (mu, logvar, eps),
    )
    full = [t.detach().expand(5, 3, 4) for t in (logvar, eps)]
    oracle = Oracle(mu, *full, **options)
    assert worst(out.kl, oracle.kl, KL_BUDGET[torch.float32] * oracle.kl) <= 1
    assert out.z.dtype == dtype
    assert worst(out.z, oracle.z, 2 * unit(dtype) * np.abs(oracle.z) + 1e-6) <= 1

    exact = oracle.gradients(*upstream)
    bounds = gradient_bounds(oracle, torch.float32, dtype, *upstream)
    assert worst(dmu, exact["dmu"], bounds["dmu"]) <= 1
    for found, name in ((dlogvar, "dlogvar"), (deps, "deps")):
        assert found.shape == shape
        summed = torch.from_numpy(exact[name]).sum_to_size(shape).numpy()
        bound = torch.from_numpy(bounds[name]).sum_to_size(shape).numpy()
        bound = bound + (2 * unit(dtype) + 1e-5) * np.abs(exact[name]).sum()
        assert worst(found, summed, bound) <= 1


@pytest.mark.parametrize("number", [0, -1.5, np.float32(0.25), np.int64(1)], ids=repr)
def test_numbers(number, backend, device):
    """What a tensor of the same values gives; in half precision they keep their digits."""
    mu = make_inputs((6, 4), dtype=torch.float16, device=device)[0]
    full = torch.full_like(mu, float(number))
    for options in ({}, {"reduction": "none", "mean_over": "all"}):
        out = vaekl.reparameterize_kl(mu, number, eps=number, backend=backend, **options)
        same = vaekl.reparameterize_kl(mu, full, eps=full, backend=backend, **options)
        assert out.z.dtype == torch.float16
        for a, b in zip(out, same):
            assert torch.equal(a, b)
    oracle = Oracle(mu, np.full((6, 4), -3.3), reduction="none")
    kl = vaekl.kl_loss(mu, -3.3, reduction="none", backend=backend)
    assert worst(kl, oracle.kl, KL_BUDGET[torch.float32] * oracle.kl) <= 1


@pytest.mark.parametrize("of_eps", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_logvar", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_mu", [torch.float16, torch.float32, torch.float64])
def test_z_has_the_dtype_that_torch_gives(of_mu, of_logvar, of_eps, backend, device):
    """Tensors without axes do not count beside those with some."""
    mu = torch.zeros(2, 3, dtype=of_mu, device=device)
    for shapes in (((), ()), ((3,), ()), ((), (2, 1)), ((3,), (3,))):
        logvar, eps = (
            torch.zeros(s, dtype=d, device=device) for s, d in zip(shapes, (of_logvar, of_eps))
        )
        z, kl, _ = vaekl.reparameterize_kl(mu, logvar, eps=eps, backend=backend)
        plain = torch_reparameterize_kl(mu, logvar.expand(2, 3) if logvar.dim() else logvar, eps)
        assert z.dtype == plain[0].dtype
        assert kl.dtype in (torch.float32, torch.float64)
        still = vaekl.nn.ReparameterizeKL(backend=backend).eval()(mu, logvar)
        assert still.z.dtype == torch.result_type(mu, logvar)


def test_every_public_function(backend, device):
    mu = make_inputs((6, 4), device=device)[0]
    logvar = small((4,), torch.float32, device).detach()
    full = logvar.expand(6, 4)
    pairs = [
        (
            vaekl.kl_loss(mu, v, backend=backend),
            vaekl.kl_of_mean(mu, v, backend=backend),
            vaekl.reparameterize(mu, v, seed=1, backend=backend),
            *vaekl.nn.ReparameterizeKL(backend=backend)(mu, v, seed=2),
            vaekl.diagnose(mu, v, backend=backend).kl_dims,
            vaekl.DiagnosticsAccumulator(backend=backend).update(mu, v).report().information_dims,
        )
        for v in (logvar, full)
    ]
    for a, b in zip(*pairs):
        assert torch.equal(a, b)
    moments = torch.cat([mu, full], 1)
    packed = vaekl.reparameterize_kl_moments(moments, eps=logvar, backend=backend)
    assert torch.equal(packed.z, vaekl.reparameterize(mu, full, eps=full, backend=backend))


def test_under_transforms_and_compile(backend, device):
    mu, logvar = make_inputs((6, 4), device=device)[0], small((4,), torch.float32, device).detach()

    def loss(v):
        return vaekl.kl_loss(mu, v, backend=backend)

    expected = torch.autograd.grad(loss(logvar.requires_grad_()), logvar)[0]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.func.grad(loss)(logvar.detach()), expected)
    torch.testing.assert_close(torch.autograd.grad(compiled(logvar), logvar)[0], expected)
    one_for_all = torch.compile(lambda m: vaekl.kl_loss(m, -1.0, backend=backend), fullgraph=True,
                                backend="aot_eager")  # fmt: skip
    assert torch.equal(one_for_all(mu), vaekl.kl_loss(mu, -1.0, backend=backend))


@pytest.mark.parametrize("shape", [(3,), (2, 4), (5, 4), (1, 5, 4), (0, 4)], ids=str)
@pytest.mark.parametrize("name", ["logvar", "eps"])
def test_what_does_not_broadcast_to_mu(name, shape, backend, device):
    """Nor may mu be the smaller one: the result has its shape."""
    mu = torch.zeros(1 if shape[0] == 5 else 8, 4, device=device)
    given = {"logvar": mu, "eps": mu, name: torch.zeros(shape, device=device)}
    with pytest.raises(ValueError, match=rf"{name} must have the shape of mu, .*; got \("):
        vaekl.reparameterize_kl(mu, given["logvar"], eps=given["eps"], backend=backend)


@pytest.mark.parametrize("value", ["0.0", True, None, [0.0], 1j])
def test_what_is_no_number(value, device):
    with pytest.raises(TypeError, match=r"logvar must be a torch\.Tensor"):
        vaekl.kl_loss(torch.zeros(2, 3, device=device), value)


def test_a_number_takes_no_memory_of_mus_size(backend, device):
    """Strides of 0, saved for backward as they are."""
    mu = torch.zeros(64, 8, device=device, requires_grad=True)
    logvar = torch.zeros((), device=device, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kl = vaekl.kl_loss(mu, logvar, backend=backend)
    kl.backward()
    others = [t for t in saved if t.data_ptr() != mu.data_ptr()]
    assert all(t.untyped_storage().nbytes() <= 16 for t in others)
    assert to_numpy(logvar.grad) == 0.0
