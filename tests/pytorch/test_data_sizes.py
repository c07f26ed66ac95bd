"""Sizes that the data decide (masks, .item(), lengths on the device) in whole-graph programs."""

import pytest
import torch

import vaekl
from modules import Function
from vaekl.testing import make_inputs

WAYS = {
    "one mask": lambda t, keep: t[keep],
    "equal masks": lambda t, keep: t[keep.clone()],
    "item": lambda t, keep: t[: _count(keep, len(t))],
    "masked_select": lambda t, keep: t.masked_select(keep[:, None].expand_as(t)).view(-1, 8),
    "repeat_interleave": lambda t, keep: t.repeat_interleave(keep.long() + 1, 0),
}
CALLS = {
    "both": lambda m, v, **o: vaekl.reparameterize_kl(m, v, seed=3, **o),
    "given": lambda m, v, **o: vaekl.reparameterize_kl(
        m, v, eps=m + 1, reduction="none", mean_over="all", clamp=(-1, 1), **o
    ),
    "columns": lambda m, v, **o: vaekl.reparameterize_kl(
        m.t(), v.t(), reduction="mean", seed=3, kl_of_mean=False, **o
    )[:2],
    "moments": lambda m, v, **o: vaekl.reparameterize_kl_moments(torch.cat([m, v], 1), seed=3, **o),
    "moments end to end": lambda m, v, **o: vaekl.reparameterize_kl_moments(
        torch.cat([m, m], 0), dim=0, seed=3, **o
    ),
    "broadcast": lambda m, v, **o: vaekl.reparameterize_kl(m, v[:, :1], seed=3, **o),
    "mode": lambda m, v, **o: vaekl.nn.ReparameterizeKL(**o).eval()(m, v),
}
PAIRS = [("one mask", call) for call in CALLS] + [(way, "both") for way in list(WAYS)[1:]]
PAIRS += [("equal masks", call) for call in list(CALLS)[1:]]


def _count(keep, most):
    n = keep.sum().item()
    torch._check(n <= most)
    return n


def inputs(seed, device):
    mu, logvar = make_inputs((16, 8), device=device, seed=seed)
    return mu, logvar, torch.arange(16, device=device) % (seed + 2) > 0


@pytest.fixture(autouse=True)
def _sizes_from_data():
    options = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
    with torch._dynamo.config.patch(options):
        yield
    torch._dynamo.reset()


def whole_graph(capture, way, call, device, **options):
    """A program of one batch computes what the call does of another, of another size."""

    def function(m, v, keep):
        mu, logvar = WAYS["one mask" if way == "equal masks" else way](m, keep), WAYS[way](v, keep)
        return tuple(CALLS[call](mu, logvar, **options))

    program = capture(function, inputs(0, device))
    for tensors in (inputs(0, device), inputs(1, device)):
        for found, expected in zip(program(*tensors), function(*tensors), strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize(("way", "call"), PAIRS)
def test_compile(way, call, device):
    compiled = lambda f, _: torch.compile(f, fullgraph=True, backend="aot_eager")  # noqa: E731
    whole_graph(compiled, way, call, device)


@pytest.mark.parametrize(("way", "call"), PAIRS)
def test_export(way, call, device):
    whole_graph(lambda f, t: torch.export.export(Function(f), t).module(), way, call, device)


@pytest.mark.parametrize("way", ["item", "equal masks"])
def test_strict_export(way, device):
    exported = lambda f, t: torch.export.export(Function(f), t, strict=True).module()  # noqa: E731
    whole_graph(exported, way, "both", device)


def test_gradients(backend, device):
    def loss(m, v, keep):
        out = vaekl.reparameterize_kl(m[keep], v[keep.clone()], seed=3, backend=backend)
        return out.z.sum() + out.kl + out.kl_of_mean

    mu, logvar, keep = inputs(0, device)
    leaves = [t.requires_grad_() for t in (mu, logvar)]
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        found.append(torch.autograd.grad(function(mu, logvar, keep), leaves))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_sizes_that_differ_are_noticed_when_the_program_runs(backend, device):
    def function(m, v, keep, other):
        return vaekl.kl_loss(m[keep], v[other], backend=backend)

    mu, logvar, keep = inputs(0, device)
    program = torch.compile(function, fullgraph=True, backend="aot_eager")
    program(mu, logvar, keep, keep)
    with pytest.raises(RuntimeError):
        program(mu, logvar, keep, torch.ones_like(keep))
