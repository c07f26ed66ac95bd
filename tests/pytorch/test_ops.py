"""The operators: schemas and fakes agree with what runs, and modes and subclasses see them."""

import pytest
import torch

import vaekl
from vaekl.testing import make_inputs

FORWARD = torch.ops.vaekl.reparameterize_kl.default
BACKWARD = torch.ops.vaekl.reparameterize_kl_backward.default
# An operator draws anew at each call, so only calls with a seed can be compared with a second run.
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")
OPTIONS = [
    ("none", "batch", True, 1, None),
    ("mean", "all", True, 2, [-1.0, 1.0]),
    (None, "batch", False, 1, None),
    ("sum", None, True, 1, None),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "steps"])
@pytest.mark.parametrize("given", [False, True])
def test_opcheck(options, layout, given, backend, device):
    mu, logvar = make_inputs((2, 3, 2, 4), layout=layout, device=device)
    eps = make_inputs((2, 3, 2, 4), device=device, seed=5)[0] if given and options[2] else None
    seed = None if eps is not None else 7
    torch.library.opcheck(
        FORWARD, (mu, logvar, eps, None, seed, *options, backend), test_utils=CHECKS
    )
    z, kl, kl_of_mean, state, means = FORWARD(mu, logvar, eps, None, seed, *options, backend)
    upstream = [
        torch.randn_like(out) if wanted else None
        for out, wanted in zip((z, kl, kl_of_mean), (options[2], options[0], options[1]))
    ]
    needs = [True, True, eps is not None]
    torch.library.opcheck(
        BACKWARD,
        (mu, logvar, eps, *upstream, state, means, *options, backend, needs),
        test_utils=CHECKS,
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("given", [False, True])
def test_opcheck_of_gradients(options, given, backend, device):
    """All of torch's checks where inputs need gradients: registration, and symbolic sizes through
    AOTAutograd, forward and backward against the same without. The second operator is never
    differentiated: what is differentiated twice is made of plain operations."""
    mu, logvar = (t.requires_grad_() for t in make_inputs((2, 3, 2, 4), device=device))
    eps = make_inputs((2, 3, 2, 4), device=device, seed=5)[0] if given and options[2] else None
    seed = None if eps is not None else 7
    torch.library.opcheck(FORWARD, (mu, logvar, eps, None, seed, *options, backend))


@pytest.mark.parametrize("given", [False, True])
def test_a_dispatch_mode_sees_the_operators(given, backend, device, operators):
    """And gets the same results as the direct way."""
    mu, logvar = (t.requires_grad_() for t in make_inputs((4, 6), device=device))
    noise = {"eps": torch.ones_like(mu)} if given else {"seed": 3}
    call = lambda: vaekl.reparameterize_kl(mu, logvar, kl_of_mean=given, backend=backend, **noise)  # noqa: E731
    upstream = [torch.randn_like(out) for out in call() if out is not None]

    def step():
        outputs = [out for out in call() if out is not None]
        return (*outputs, *torch.autograd.grad(outputs, (mu, logvar), upstream))

    direct = step()
    with operators:
        through = step()
    assert str(FORWARD) in operators.names
    assert str(BACKWARD) in operators.names
    assert all(torch.equal(a, b) for a, b in zip(direct, through))


def test_meta_tensors(backend):
    mu = torch.empty(4, 6, device="meta", dtype=torch.bfloat16, requires_grad=True)
    z, kl, kl_of_mean = vaekl.reparameterize_kl(mu, mu, reduction="none", backend=backend)
    assert (z.shape, z.dtype) == ((4, 6), torch.bfloat16)
    assert (kl.shape, kl.dtype) == ((4,), torch.float32)
    assert kl_of_mean.shape == ()
    kl.sum().backward()
    assert mu.grad.is_meta
