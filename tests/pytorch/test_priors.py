"""A prior on every road: operators, captures, transforms, and derivatives of derivatives."""

import copy

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence
from torch.func import grad, hessian, jvp, vmap

import vaekl
from steps import scale_of
from storages import PACKED
from vaekl import _operators
from vaekl._spec import Outputs, Spec, to_text
from vaekl.reference import SCALES
from vaekl.testing import make_inputs, step

FORWARD = torch.ops.vaekl.reparameterize_kl.default
BACKWARD = torch.ops.vaekl.reparameterize_kl_backward.default
KINDS = {"sample": (4, 6), "event": (6,)}


def tensors(scale, kind, device, dtype=torch.float64):
    """mu, scale, prior's mean and scale."""
    posterior = make_inputs((4, 6), dtype=dtype, device=device)
    prior = make_inputs(KINDS[kind], dtype=dtype, device=device, seed=2)
    return [posterior[0], scale_of(scale, posterior[1]), prior[0], scale_of(scale, prior[1])]


def ours(kind, **options):
    options = {"kl_of_mean": kind == "event", **options}

    def call(mu, scale, *prior):
        out = vaekl.reparameterize_kl(mu, scale, prior=prior, **options)
        return tuple(t for t in out if t is not None)

    return call


def plain(scale, **options):
    """torch.distributions, of kl_loss."""

    def call(mu, s, mean, prior):
        deviations = {
            "logvar": lambda t: (t / 2).exp(), "log_std": torch.exp, "std": lambda t: t,
            "var": torch.sqrt,
        }  # fmt: skip
        q, p = (Normal(m, deviations[scale](t)) for m, t in ((mu, s), (mean, prior)))
        return kl_divergence(Independent(q, 1), Independent(p, 1)).mean()

    return call


def loss(scale, backend):
    return lambda mu, s, *prior: vaekl.kl_loss(mu, s, scale=scale, prior=prior, backend=backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", SCALES)
def test_torch_distributions_agrees(scale, kind, backend, device):
    given = tensors(scale, kind, device)
    found, expected = (step(f, given) for f in (loss(scale, backend), plain(scale)))
    for a, b in zip(found.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", SCALES)
def test_gradcheck(scale, kind, backend, many_programs, device):
    given = [t.requires_grad_() for t in tensors(scale, kind, device)]
    call = ours(kind, scale=scale, backend=backend, seed=3)
    fast = backend == "triton"
    assert torch.autograd.gradcheck(call, given, fast_mode=fast, check_undefined_grad=not fast)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", SCALES)
def test_gradgradcheck(scale, kind, device):
    given = [t.requires_grad_() for t in tensors(scale, kind, device)]
    call = ours(kind, scale=scale, backend="eager", seed=3)
    assert torch.autograd.gradgradcheck(call, given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", SCALES)
def test_transforms(scale, kind, backend, device):
    given = tensors(scale, kind, device)
    every = tuple(range(4))
    for a, b in zip(
        grad(loss(scale, backend), every)(*given), grad(plain(scale), every)(*given), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    tangents = tuple(torch.randn_like(t) for t in given)
    both = [jvp(f, tuple(given), tangents) for f in (loss(scale, backend), plain(scale))]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-11)
    both = [hessian(f, argnums=3)(*given) for f in (loss(scale, backend), plain(scale))]
    torch.testing.assert_close(*both, rtol=1e-8, atol=1e-10)
    if kind == "event":  # for each of several priors, and for each sample
        many = torch.stack([given[2], given[2] + 1.0])
        found = vmap(loss(scale, backend), (None, None, 0, None))(*given[:2], many, given[3])
        each = [loss(scale, backend)(*given[:2], mean, given[3]) for mean in many]
        torch.testing.assert_close(found, torch.stack(each))
    else:
        one = lambda *t: loss(scale, backend)(*(x[None] for x in t))  # noqa: E731
        found = vmap(grad(one, every))(*given)
        whole = grad(lambda *t: 4 * loss(scale, backend)(*t), every)(*given)
        torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind, storage, backend, device):
    mu, logvar, *prior = tensors("logvar", kind, device, torch.float32)

    def call(*given):
        *given, mean, scale = given
        options = {"prior": (mean, scale), "seed": 3, "backend": backend}
        out = storage.call(*given, kl_of_mean=kind == "event", **options)
        return tuple(t for t in out if t is not None)

    given = [*storage.store(mu, logvar), *prior]
    program = torch.compile(call, backend="aot_eager", fullgraph=True)
    for a, b in zip(step(program, given).tensors, step(call, given).tensors, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_export(kind, backend, device):
    class Loss(torch.nn.Module):
        def forward(self, *given):
            return ours(kind, seed=3, backend=backend)(*given)

    given = tuple(tensors("std", kind, device, torch.float32))
    program = torch.export.export(Loss(), given).module()
    for a, b in zip(program(*given), Loss()(*given), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [False, True])
def test_opcheck(kind, given, storage, backend, device):
    mu, logvar = make_inputs((4, 6, 2), device=device)
    prior = make_inputs((2, 6), device=device, seed=2)
    prior = [t.t() if kind == "event" else t.t().expand(4, 6, 2) for t in prior]
    packed = storage.dim if storage is PACKED else None
    mean_over = "batch" if kind == "event" else None
    spec = Spec(
        True,
        "none",
        mean_over,
        1,
        "logvar",
        None,
        backend,
        has_eps=given,
        packed=packed,
        prior=kind,
    )
    eps = [torch.randn_like(mu)] if given else []
    given = [*storage.store(mu, logvar), *eps, *prior]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    seed = None if eps else 7
    arguments = (given[0], given[1:], None, seed, None, to_text(spec))
    torch.library.opcheck(FORWARD, arguments, test_utils=checks)
    outputs, saved = _operators.named(spec, FORWARD(*arguments))
    for unused in ([], ["z"], ["kl", "kl_of_mean"]):
        upstream = [
            None if out is None or name in unused else torch.randn_like(out)
            for name, out in zip(Outputs._fields, outputs)
        ]
        backward = (given, upstream, [*saved], to_text(spec), [True] * len(given))
        torch.library.opcheck(BACKWARD, backward, test_utils=checks)
    for tensor in given:
        tensor.requires_grad_()
    if not eps:
        torch.library.opcheck(FORWARD, arguments)


def test_a_call_that_does_not_fit_its_text(backend, device):
    """Kernels would read past the end of the prior."""
    mu, logvar, mean, scale = tensors("logvar", "event", device, torch.float32)
    spec = Spec(True, "none", None, 1, "logvar", None, backend, prior="event")
    for wrong in (mean[:3], mu):
        with pytest.raises(ValueError, match="the prior's mean must have shape"):
            FORWARD(mu, [logvar, wrong, scale], None, 1, None, to_text(spec))
    with pytest.raises(ValueError, match="this spec is of 4 tensors"):
        FORWARD(mu, [logvar], None, 1, None, to_text(spec))


@pytest.mark.parametrize("kind", KINDS)
def test_packed(kind, backend, many_programs, device):
    """To the bit, as two tensors."""
    mu, logvar, *prior = tensors("logvar", kind, device, torch.float32)
    options = {"kl_of_mean": kind == "event", "seed": 3, "backend": backend}
    pair = step(
        lambda *t: vaekl.reparameterize_kl(*t[:2], prior=t[2:], **options), (mu, logvar, *prior)
    )
    one = step(
        lambda *t: vaekl.reparameterize_kl_moments(t[0], prior=t[1:], **options),
        (torch.cat([mu, logvar], 1), *prior),
    )
    for a, b in zip(pair.outputs, one.outputs, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert torch.equal(torch.cat(pair.gradients[:2], 1), one.gradients[0])
    for a, b in zip(pair.gradients[2:], one.gradients[1:], strict=True):
        assert torch.equal(a, b)


def test_module(backend, device):
    """The prior is the call's, as the noise is."""
    mu, logvar, *prior = tensors("logvar", "event", device, torch.float32)
    module = copy.deepcopy(vaekl.nn.ReparameterizeKL(backend=backend))
    found = module(mu, logvar, prior=prior, seed=3)
    expected = vaekl.reparameterize_kl(mu, logvar, prior=prior, seed=3, backend=backend)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(module.eval()(mu, logvar, prior=prior).kl, expected.kl)


def test_only_the_prior_learns(backend, device):
    """z has no part in it, and no gradient."""
    mu, logvar, *prior = tensors("logvar", "sample", device, torch.float32)
    prior = [t.requires_grad_() for t in prior]
    out = vaekl.reparameterize_kl(mu, logvar, prior=prior, kl_of_mean=False, backend=backend)
    assert out.kl.requires_grad
    assert not out.z.requires_grad
    out.kl.backward()
    assert all(t.grad.any() for t in prior)


def test_autocast_and_checkpoint(backend, device):
    from torch.utils.checkpoint import checkpoint

    given = tensors("logvar", "event", device, torch.float32)
    call = ours("event", seed=3, backend=backend)
    expected = step(call, given)
    with torch.autocast(device, torch.bfloat16):
        found = step(lambda *t: checkpoint(call, *t, use_reentrant=False), given)
    for a, b in zip(found.tensors, expected.tensors, strict=True):
        assert torch.equal(a, b)
