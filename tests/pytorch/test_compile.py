"""torch.compile: one graph, the results and the random state of eager calls, few recompilations."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch.func import grad, jvp, vmap

import vaekl
from storages import PACKED
from vaekl.testing import make_inputs, step

FUNCTIONS = {
    "reparameterize_kl": lambda m, v, **o: tuple(vaekl.reparameterize_kl(m, v, **o)),
    "sums and clamp": lambda m, v, **o: tuple(
        vaekl.reparameterize_kl(m, v, reduction="none", mean_over="all", clamp=(None, 0.5), **o)
    ),
    "reparameterize": lambda m, v, **o: (vaekl.reparameterize(m, v, **o),),
    "kl_loss": lambda m, v, **o: (vaekl.kl_loss(m, v, reduction="mean", **o),),
    "kl_of_mean": lambda m, v, **o: (vaekl.kl_of_mean(m, v, **o),),
    "module": lambda m, v, **o: tuple(vaekl.nn.ReparameterizeKL(**o)(m, v)),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(function, inputs, seed=0):
    """Forward and backward, and the random state that is left."""
    torch.manual_seed(seed)
    found = step(function, inputs)
    cuda = inputs[0].device.type == "cuda"
    return [*found.tensors, torch.cuda.get_rng_state() if cuda else torch.get_rng_state()]


def equal(actual, expected):
    """To the bit: the same kernels run on the same numbers."""
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_one_graph(name, backend, device):
    """Forward and backward, noise from torch's generator: results and state as without."""
    call = lambda m, v: FUNCTIONS[name](m, v, backend=backend)  # noqa: E731
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        pair = make_inputs((4, 6), device=device, seed=seed)
        assert equal(run(compiled, pair, seed), run(call, pair, seed))


def test_eval_mode(backend, device):
    module = vaekl.nn.ReparameterizeKL(backend=backend).eval()
    call = lambda m, v: tuple(module(m, v))  # noqa: E731
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    pair = make_inputs((4, 6), device=device)
    assert equal(run(compiled, pair), run(call, pair))


@pytest.mark.parametrize("dynamic", [None, True])
def test_batches_of_any_size(dynamic, backend, device):
    """One recompilation at most, with the last, smaller batch of an epoch among them."""
    call = lambda m, v: tuple(vaekl.reparameterize_kl(m, v, reduction="none", backend=backend))  # noqa: E731
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=dynamic)
    for batch in (4, 9, 7, 33, 4):
        pair = make_inputs((batch, 6), device=device)
        assert equal(run(compiled, pair), run(call, pair))
    assert counter.frame_count == (1 if dynamic else 2)


def test_a_seed_for_each_step(backend, device):
    """As a symbol: not one program for each."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(vaekl.reparameterize, backend=counter, fullgraph=True)
    mu, logvar = make_inputs((4, 6), device=device)
    for seed in (100, 101, 102, -3, 2**62):
        expected = vaekl.reparameterize(mu, logvar, seed=seed, backend=backend)
        assert torch.equal(compiled(mu, logvar, seed=seed, backend=backend), expected)
    assert counter.frame_count <= 3
    for seed in (2**63 + 1, 2**64 - 1):
        expected = vaekl.reparameterize(mu, logvar, seed=seed, backend=backend)
        assert torch.equal(compiled(mu, logvar, seed=seed, backend=backend), expected)


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1, -(2**63)])
def test_seeds_of_64_bits(seed, storage, backend, device):
    tensors = storage.store(*make_inputs((4, 3), device=device))
    call = lambda *t: storage.call(*t, seed=seed, backend=backend).z  # noqa: E731
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*tensors), call(*tensors))


def test_each_call_draws_anew(backend, device):
    """Two calls alike in one program are not one."""
    twice = lambda m: [vaekl.reparameterize(m, m, backend=backend) for _ in range(2)]  # noqa: E731
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    mu = torch.zeros(4, 6, device=device)
    torch.manual_seed(0)
    expected = [*twice(mu), *twice(mu)]
    torch.manual_seed(0)
    assert equal([*compiled(mu), *compiled(mu)], expected)
    assert len(torch.stack(expected).unique()) == 4 * 24


def test_eps_and_its_gradient(backend, device):
    mu, logvar = make_inputs((4, 6), device=device)
    eps = make_inputs((4, 6), device=device, seed=5)[0]
    call = lambda *t: tuple(vaekl.reparameterize_kl(t[0], t[1], eps=t[2], backend=backend))  # noqa: E731
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for needs in ((True, True, True), (False, False, True), (False, True, False)):
        leaves = [t.detach().requires_grad_(n) for t, n in zip((mu, logvar, eps), needs)]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = []
        for function in (compiled, call):
            z, kl, _ = function(*leaves)
            assert kl.requires_grad == (needs[0] or needs[1])
            loss = z.sin().sum() + (kl if kl.requires_grad else 0)
            found.append(torch.autograd.grad(loss, wanted))
        assert equal(*found)


def test_the_backward_program_holds_the_operator(storage, backend, device):
    """One launch, not the formulas of the second derivative, nor two gradients put together."""
    seen = []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    call = lambda *t: tuple(storage.call(*t, backend=backend))  # noqa: E731
    compiler = torch._dynamo.backends.common.aot_autograd(fw_compiler=look, bw_compiler=look)
    compiled = torch.compile(call, backend=compiler, fullgraph=True)
    tensors = storage.store(*make_inputs((4, 6), device=device))
    assert equal(run(compiled, tensors), run(call, tensors))
    assert seen.count("vaekl.reparameterize_kl.default") == 1
    assert seen.count("vaekl.reparameterize_kl_backward.default") == 1
    assert not [name for name in seen if "exp" in name or "randn" in name or "cat" in name]


def test_inductor(device):
    """The default compiler: a training step of a small VAE, static and dynamic batch."""
    torch.manual_seed(0)
    encoder = torch.nn.Linear(8, 6).to(device)
    decoder = torch.nn.Linear(3, 8).to(device)
    loss_module = vaekl.nn.ReparameterizeKL()

    def loss(images):
        mu, logvar = encoder(images).chunk(2, dim=-1)
        z, kl, _ = loss_module(mu, logvar)
        return (decoder(z) - images).pow(2).sum(-1).mean() + kl

    weights = [*encoder.parameters(), *decoder.parameters()]
    compiled = torch.compile(loss, fullgraph=True)
    for batch in (16, 12, 5):
        images = torch.randn(batch, 8).to(device)
        found = []
        for function in (compiled, loss):
            torch.manual_seed(batch)
            value = function(images)
            found.append([value.detach(), *torch.autograd.grad(value, weights), torch.rand(1)])
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_transforms_inside(device):
    """torch.compile of torch.func: composed of plain operations, so that both see through."""
    mu, logvar = make_inputs((4, 6), device=device)
    eps = make_inputs((4, 6), device=device, seed=5)[0]
    kl = lambda m, v: vaekl.kl_loss(m, v)  # noqa: E731
    sample = lambda m, e: vaekl.reparameterize(m, m, eps=e)  # noqa: E731
    draw = lambda m: vaekl.reparameterize(m, m)  # noqa: E731
    for transformed in (
        lambda: grad(kl, argnums=(0, 1))(mu, logvar),
        lambda: vmap(grad(kl))(mu[:, None], logvar[:, None]),
        lambda: jvp(sample, (mu, eps), (eps, mu)),
    ):
        actual = torch.compile(transformed, backend="aot_eager", fullgraph=True)()
        for a, b in zip(actual, transformed()):
            torch.testing.assert_close(a, b)
    zeros = torch.zeros(4, 1, 6, device=device)
    for randomness, different in (("different", 24), ("same", 6)):
        mapped = torch.compile(
            lambda m, r=randomness: vmap(draw, randomness=r)(m), backend="aot_eager", fullgraph=True
        )
        assert len(mapped(zeros).unique()) == different


@pytest.mark.parametrize(
    "function",
    [vaekl.reparameterize, lambda *t, **o: PACKED.call(*PACKED.store(*t), **o).z],
    ids=["pair", "packed"],
)
def test_a_generator_is_refused_or_runs_uncompiled(function, backend, device):
    """A compiled program cannot hold one (nor can torch.randn's): an error, or a graph break."""
    mu, logvar = make_inputs((4, 6), device=device)
    call = lambda m, v, g: function(m * 1, v, generator=g, backend=backend).sin()  # noqa: E731
    new = lambda: torch.Generator(device).manual_seed(3)  # noqa: E731
    with pytest.raises(torch._dynamo.exc.Unsupported, match="generator= cannot be compiled"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(mu, logvar, new())
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(call, backend=EagerAndRecordGraphs())
    assert torch.equal(compiled(mu, logvar, new()), call(mu, logvar, new()))
    reasons = " ".join(counters["graph_break"])
    assert "generator= cannot be compiled" in reasons
    assert "lru_cache" not in reasons  # the backends' own code is not looked into


def test_double_backward_says_that_torch_has_none(backend, device):
    """Of compiled programs: torch's own error, no gradient that lacks a term."""
    mu, logvar = (t.requires_grad_() for t in make_inputs((4, 6), device=device))
    compiled = torch.compile(vaekl.kl_loss, backend="aot_eager", fullgraph=True)
    kl = compiled(mu, logvar, backend=backend)
    (slope,) = torch.autograd.grad(kl, logvar, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        slope.sum().backward()


def test_bad_input_is_named(device):
    compiled = torch.compile(vaekl.kl_loss, backend="aot_eager")
    mu = torch.zeros(4, 6, device=device)
    with pytest.raises(ValueError, match=r"logvar must have the shape of mu, \(4, 6\)"):
        compiled(mu, mu[:2])


@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_of_axes_as_arguments(dynamic, device):
    """Constants of a program, though torch.compile may trace them as symbols."""
    mu, logvar = make_inputs((4, 6, 2), device=device)
    calls = (
        lambda m, v, n: vaekl.kl_loss(m, v, batch_dims=n),
        lambda m, v, n: vaekl.reparameterize_kl_moments(m, dim=n, batch_dims=n, seed=1).kl,
    )
    for call in calls:
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for n in (1, 2, 0):
            torch.testing.assert_close(compiled(mu, logvar, n), call(mu, logvar, n))
