"""The operators: schemas and fakes agree with what runs, and modes and subclasses see them."""

import pytest
import torch

from storages import PACKED, PAIR
from vaekl.testing import make_inputs, step

FORWARD = torch.ops.vaekl.reparameterize_kl.default
BACKWARD = torch.ops.vaekl.reparameterize_kl_backward.default
OF_MOMENTS = torch.ops.vaekl.reparameterize_kl_moments.default
BACKWARD_OF_MOMENTS = torch.ops.vaekl.reparameterize_kl_moments_backward.default
OPERATORS = {PAIR: (FORWARD, BACKWARD), PACKED: (OF_MOMENTS, BACKWARD_OF_MOMENTS)}
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


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "steps"])
@pytest.mark.parametrize("given", [False, True])
def test_opcheck_of_moments(layout, given, backend, device):
    moments = make_inputs((2, 4, 2, 4), layout=layout, device=device)[0]
    eps = torch.randn(2, 2, 2, 4, device=device) if given else None
    options = ("none", "batch", True, 1, [-1.0, 1.0])
    arguments = (moments, 1, eps, None, None if given else 7, *options, backend)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OF_MOMENTS, arguments, test_utils=tests)
    z, kl, kl_of_mean, state, means = OF_MOMENTS(*arguments)
    upstream = [torch.randn_like(out) for out in (z, kl, kl_of_mean)]
    torch.library.opcheck(
        BACKWARD_OF_MOMENTS,
        (moments, 1, eps, *upstream, state, means, *options, backend, [True, given]),
        test_utils=tests,
    )


def test_opcheck_of_a_backward_that_eps_has_no_part_in(storage, backend, device):
    """No gradient of z: then there is none of eps, though it is needed."""
    tensors = storage.store(*make_inputs((2, 2, 3), device=device))
    eps, options = torch.ones(2, 2, 3, device=device), ("none", "batch", True, 1, None)
    forward, backward = OPERATORS[storage]
    given = (*tensors, eps) if storage is PAIR else (*tensors, storage.dim, eps)
    _, kl, kl_of_mean, state, means = forward(*given, None, None, *options, backend)
    upstream = (None, torch.randn_like(kl), torch.randn_like(kl_of_mean))
    needs = [True] * (len(tensors) + 1)
    torch.library.opcheck(
        backward, (*given, *upstream, state, means, *options, backend, needs), test_utils=CHECKS
    )


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kl_of_mean", [False, True])
def test_a_dispatch_mode_sees_the_operators(given, kl_of_mean, storage, backend, device, operators):
    """And gets the same results as the direct way."""
    tensors = storage.store(*make_inputs((2, 2, 3), device=device))
    eps = torch.ones(2, 2, 3, device=device) if given else None
    options = {"kl_of_mean": kl_of_mean, "backend": backend} | ({} if given else {"seed": 77})
    call = lambda *t: storage.call(*t, **options)  # noqa: E731
    direct = step(call, (*tensors, eps)).tensors
    with operators:
        through = step(call, (*tensors, eps)).tensors
    assert {str(operator) for operator in OPERATORS[storage]} <= set(operators.names)
    for a, b in zip(direct, through, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_meta_tensors(reduction, storage, backend):
    mu = torch.empty(4, 6, device="meta", dtype=torch.bfloat16)
    found = step(
        lambda *t: storage.call(*t, reduction=reduction, backend=backend), storage.store(mu, mu)
    )
    z, kl, kl_of_mean = found.outputs
    assert (z.shape, z.dtype) == ((4, 6), torch.bfloat16)
    assert (kl.shape, kl.dtype) == ((4,) if reduction == "none" else (), torch.float32)
    assert kl_of_mean.shape == ()
    assert all(gradient.is_meta for gradient in found.gradients)
