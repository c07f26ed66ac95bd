"""The operators: schemas and fakes agree with what runs, and modes and subclasses see them."""

import math

import pytest
import torch

from storages import PACKED
from vaekl import _operators
from vaekl._spec import Spec, from_text, to_text
from vaekl.testing import make_inputs, step

FORWARD = torch.ops.vaekl.reparameterize_kl.default
BACKWARD = torch.ops.vaekl.reparameterize_kl_backward.default
# An operator draws anew at each call, so only calls with a seed can be compared with a second run.
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")
OPTIONS = [
    (True, "none", "batch", 1, "logvar", None),
    (True, "mean", "all", 2, "logvar", (-1.0, 1.0)),
    (False, None, "batch", 1, "logvar", None),
    (True, "sum", None, 1, "log_std", None),
]


def stored(storage, pair, options, given, backend):
    """(spec, tensors, seed) of a call of the operator."""
    tensors, seed = [*storage.store(*pair)], 7
    given = given and options[0]
    if given:
        tensors, seed = [*tensors, torch.randn_like(pair[0])], None
    packed = storage.dim if storage is PACKED else None
    return Spec(*options, backend, given, packed), tensors, seed


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "steps"])
@pytest.mark.parametrize("given", [False, True])
def test_opcheck(options, layout, given, storage, backend, device):
    pair = make_inputs((2, 3, 2, 4), layout=layout, device=device)
    spec, tensors, seed = stored(storage, pair, options, given, backend)
    arguments = (tensors[0], tensors[1:], None, seed, None, to_text(spec))
    torch.library.opcheck(FORWARD, arguments, test_utils=CHECKS)
    outputs, saved = _operators.named(spec, FORWARD(*arguments))
    upstream = [None if out is None else torch.randn_like(out) for out in outputs]
    arguments = (tensors, upstream, [*saved], to_text(spec), [True] * len(tensors))
    torch.library.opcheck(BACKWARD, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("given", [False, True])
def test_opcheck_of_gradients(options, given, storage, backend, device):
    """All of torch's checks where inputs need gradients: registration, and symbolic sizes through
    AOTAutograd, forward and backward against the same without. The second operator is never
    differentiated: what is differentiated twice is made of plain operations."""
    pair = make_inputs((2, 3, 2, 4), device=device)
    spec, tensors, seed = stored(storage, pair, options, given, backend)
    for tensor in tensors[: len(tensors) - spec.has_eps]:
        tensor.requires_grad_()
    torch.library.opcheck(FORWARD, (tensors[0], tensors[1:], None, seed, None, to_text(spec)))


def test_opcheck_of_a_backward_that_eps_has_no_part_in(storage, backend, device):
    """No gradient of z: then there is none of eps, though it is needed."""
    pair = make_inputs((2, 2, 3), device=device)
    spec, tensors, seed = stored(storage, pair, OPTIONS[0], True, backend)
    (_, kl, kl_of_mean), saved = _operators.named(
        spec, FORWARD(tensors[0], tensors[1:], None, seed, None, to_text(spec))
    )
    upstream = [None, torch.randn_like(kl), torch.randn_like(kl_of_mean)]
    arguments = (tensors, upstream, [*saved], to_text(spec), [True] * len(tensors))
    torch.library.opcheck(BACKWARD, arguments, test_utils=CHECKS)


def test_a_forward_that_does_not_fit_its_text(backend, device):
    mu, logvar = make_inputs((4, 6), device=device)
    pair = Spec(True, "none", "batch", 1, "logvar", None, backend)
    for spec, others in (
        (pair._replace(has_eps=True), [logvar]),
        (pair, [logvar, logvar]),
        (pair, []),
        (pair._replace(packed=1), [logvar]),
    ):
        with pytest.raises(ValueError, match="this spec is of"):
            FORWARD(mu, others, None, None if spec.has_eps else 1, None, to_text(spec))
    with pytest.raises(ValueError, match="even size"):
        FORWARD(mu[:, :5], [], None, 1, None, to_text(pair._replace(packed=1)))


@pytest.mark.parametrize("wrong", ["dz", "dkl", "all", "saved", "means", "logvar"])
def test_a_backward_that_does_not_fit_its_text(wrong, backend, device):
    """Kernels would read past the end of it."""
    mu, logvar = make_inputs((4, 6), device=device)
    spec = Spec(True, "none", "batch", 1, "logvar", None, backend)
    outputs, saved = _operators.named(spec, FORWARD(mu, [logvar], None, 1, None, to_text(spec)))
    upstream, saved, storage = [*outputs], [*saved], [mu, logvar]
    BACKWARD(storage, upstream, saved, to_text(spec), [True, True])  # a kind that is known
    if wrong == "dz":
        upstream[0] = upstream[0][:2]
    elif wrong == "dkl":
        upstream[1] = upstream[1][:1]
    elif wrong == "all":
        upstream = [None] * 3
    elif wrong == "saved":
        saved = [None, saved[1], None]
    elif wrong == "means":
        saved[1] = saved[1][:, :3]
    else:
        storage[1] = logvar[:1]
    with pytest.raises(ValueError, match=r"must (have|be given)"):
        BACKWARD(storage, upstream, saved, to_text(spec), [True, True])


@pytest.mark.parametrize("packed", [None, 0, 3])
@pytest.mark.parametrize("clamp", [None, (-math.inf, 1.0), (-0.1, math.inf), (1e-300, 1 / 3)])
@pytest.mark.parametrize("options", OPTIONS)
def test_text_of_a_spec(options, clamp, packed, backend):
    spec = Spec(*options[:-1], clamp, backend, has_eps=True, packed=packed)
    assert from_text(to_text(spec)) == spec


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
    assert {str(FORWARD), str(BACKWARD)} <= set(operators.names)
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


@pytest.mark.parametrize("samples", ["ids", "keys"])
def test_samples(samples, backend, device):
    """Noise by sample: torch's checks, and as many of them as the kernels read."""
    mu, logvar = (t.requires_grad_() for t in make_inputs((4, 6), device=device))
    spec = Spec(True, "none", None, 1, "logvar", None, backend, samples=samples)
    given = torch.arange(8, device=device).reshape(4, 2)
    given = given[:, 0] if samples == "ids" else given
    seed = 3 if samples == "ids" else None
    text = to_text(spec)
    if samples == "ids" or backend != "eager":  # which has no keys
        torch.library.opcheck(FORWARD, (mu, [logvar], None, seed, given, text))
    for wrong in (given[:3], given.int(), None):
        with pytest.raises(ValueError, match=r"samples must be [48] of torch\.int64"):
            FORWARD(mu, [logvar], None, seed, wrong, text)
    with pytest.raises(ValueError, match=r"must be None for this spec, got [48] of"):
        FORWARD(mu, [logvar], None, 3, given, to_text(spec._replace(samples=None)))
    if backend != "eager":
        _, saved = _operators.named(spec, FORWARD(mu, [logvar], None, seed, given, text))
        upstream = [torch.randn_like(mu), None, None]
        needs = [True, True]
        kept = saved._replace(samples=given)
        arguments = ([mu.detach(), logvar.detach()], upstream, [*kept], text, needs)
        torch.library.opcheck(BACKWARD, arguments)
        with pytest.raises(ValueError, match="samples must be"):
            BACKWARD(*arguments[:2], [*saved], text, needs)
