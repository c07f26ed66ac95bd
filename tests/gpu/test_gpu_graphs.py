"""CUDA graphs: every replay draws anew, and its gradients are those of its own z.

A captured graph reads its noise key on the device at each replay, and has counters of its own.
"""

import pytest
import torch

import vaekl
from vaekl import _plans
from vaekl.backends import layout as geometry
from vaekl.testing import CONFIGS, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


class Step:
    """Forward and backward of one batch, eager or captured: (z, kl, kl_of_mean, dmu, dlogvar)."""

    def __init__(self, shape, device, **options):
        self.mu, self.logvar = (t.requires_grad_() for t in make_inputs(shape, device=device))
        self.upstream = [torch.ones(shape, device=device)]
        self.upstream += [torch.ones((), device=device) for _ in range(2)]
        self.options = options

    def __call__(self):
        out = vaekl.reparameterize_kl(self.mu, self.logvar, backend="triton", **self.options)
        inputs = (self.mu, self.logvar)
        return [o.detach() for o in out] + list(
            torch.autograd.grad(tuple(out), inputs, self.upstream)
        )

    def check(self, z, kl, kl_of_mean, dmu, dlogvar):
        """All five fit each other; kl and kl_of_mean by plain float64."""
        mu, logvar = self.mu.detach().double(), self.logvar.detach().double()
        elements = 0.5 * (mu**2 + logvar.expm1() - logvar)
        means = mu.mean(0), logvar.mean(0)
        torch.testing.assert_close(kl.double(), elements.sum(1).mean(), rtol=1e-6, atol=0)
        of_mean = 0.5 * (means[0] ** 2 + means[1].expm1() - means[1]).sum()
        torch.testing.assert_close(kl_of_mean.double(), of_mean, rtol=1e-5, atol=1e-6)
        slopes = (mu + means[0]) / len(mu), (logvar.expm1() + means[1].expm1()) / len(mu)
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(dmu.double(), 1 + slopes[0], **close)
        torch.testing.assert_close(dlogvar.double(), 0.5 * (z.double() - mu + slopes[1]), **close)


def captured(call, *generators):
    """(graph, what `call` returned): refilled by each replay. Compiles outside the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if torch.__version__ < "2.12":  # later ones notice by themselves
        for generator in generators:
            graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def replays(graph, results, count):
    """Results of `count` replays, stacked."""
    kept = []
    for _ in range(count):
        graph.replay()
        kept.append([r.clone() for r in results])
    return [torch.stack(column) for column in zip(*kept)]


def all_differ(z):
    return len(z.flatten(1).cpu().unique(dim=0)) == len(z)


@pytest.mark.parametrize("shape", [(64, 32), (200, 70)], ids=["one program", "many"])
def test_a_thousand_replays(shape, device):
    """Noise is fresh, normal, and unrelated from replay to replay; gradients fit their own z."""
    torch.manual_seed(5)
    step = Step(shape, device)
    grid = geometry.grid(*shape, geometry.current_config())
    assert (grid.tiles * grid.ranges > 1) == (shape == (200, 70))
    columns = replays(*captured(step), 1000)
    z, kl, kl_of_mean, dmu, _ = columns
    assert all_differ(z[:, :8])
    for first in (kl, kl_of_mean, dmu):
        assert (first == first[0]).all()
    for i in (0, 1, 500, 999):
        step.check(*(column[i] for column in columns))
    half_noise = columns[4] - columns[4].mean(0)  # dlogvar but for what does not depend on noise
    half_z = 0.5 * (z - z.mean(0))
    torch.testing.assert_close(half_noise, half_z, rtol=1e-4, atol=1e-4)

    eps = ((z - step.mu.detach()) * torch.exp(-0.5 * step.logvar.detach())).double()
    n = eps.numel()
    assert abs(eps.mean().item()) < 5 / n**0.5
    assert abs(eps.var().item() - 1) < 5 * (2 / n) ** 0.5
    assert abs((eps[1:] * eps[:-1]).mean().item()) < 5 / n**0.5
    stats = pytest.importorskip("scipy.stats")
    some = eps.flatten()[:: max(1, n // 2**20)].cpu().numpy()
    assert stats.kstest(some, "norm").pvalue > 1e-4


def test_manual_seed_reproduces_replays_and_a_new_capture(device):
    step = Step((64, 32), device)
    runs = []
    for _ in range(2):
        graph, results = captured(step)
        for _ in range(2):
            torch.manual_seed(5)
            runs.append(replays(graph, results, 5)[0])
    assert all_differ(runs[0])
    for again in runs[1:]:
        assert torch.equal(again, runs[0])
    torch.manual_seed(6)
    assert not torch.equal(replays(graph, results, 5)[0], runs[0])


def test_a_generator_of_ones_own(device):
    generator = torch.Generator(device).manual_seed(5)
    step = Step((64, 32), device, generator=generator)
    graph, results = captured(step, generator)
    generator.manual_seed(7)
    before = torch.cuda.get_rng_state()
    first = replays(graph, results, 5)[0]
    assert all_differ(first)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    generator.manual_seed(7)
    assert torch.equal(replays(graph, results, 5)[0], first)


def test_seed_gives_each_replay_the_same_noise(device):
    step = Step((1000, 70), device, seed=3)
    expected = step()
    for column, one in zip(replays(*captured(step), 20), expected):
        assert (column == one).all()


class Watched:
    """A step that adds to `wrong`, on the device, whenever a result is not the expected one.

    With seed=: graphs that draw from torch's generator share its state, so torch itself does not
    allow their replays to overlap.
    """

    def __init__(self, shape, device, **options):
        self.step = Step(shape, device, seed=3, **options)
        self.expected = self.step()
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self):
        for result, expected in zip(self.step(), self.expected):
            self.wrong += (result != expected).any()


def test_graphs_at_once_on_two_streams(device):
    """Each has counters of its own; the same few multiprocessors run both."""
    watched = [Watched((1000, 70), device), Watched((1000, 70), device, reduction="mean")]
    watched += [Watched((33, 4000), device), Watched((2000, 40), device, mean_over="all")]
    graphs = [captured(w)[0] for w in watched]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for i in range(500):
        for j, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                graphs[2 * j + i % 2].replay()
    torch.cuda.synchronize()
    assert [w.wrong.item() for w in watched] == [0] * 4


def test_replays_and_calls_take_turns(device):
    """Eager launches of the same stream and of another, between and during replays."""
    watched = Watched((1000, 70), device)
    graph, _ = captured(watched)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    elsewhere = Watched((1000, 70), device, mean_over="all")
    torch.cuda.synchronize()
    for _ in range(200):
        graph.replay()
        watched()
        with torch.cuda.stream(other):
            elsewhere()
    torch.cuda.synchronize()
    assert (watched.wrong.item(), elsewhere.wrong.item()) == (0, 0)


def test_noise_of_replays_and_calls_never_repeats(device):
    """The default generator, drawn from by both in turn."""
    torch.manual_seed(5)
    step = Step((64, 32), device)
    graph, results = captured(step)
    kept = []
    for _ in range(20):
        graph.replay()
        kept += [results[0].clone(), step()[0]]
    assert all_differ(torch.stack(kept))


def test_capture_after_an_error_in_a_capture(device):
    """A capture that dies leaves the next one, and eager calls, as they were."""
    with _plans.use_config(CONFIGS["many"]):
        step = Step((37, 42), device, seed=3)
        expected = step()

        def interrupted():
            step()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), torch.cuda.graph(torch.cuda.CUDAGraph()):
            interrupted()
        for column, one in zip(replays(*captured(step), 3), expected):
            assert (column == one).all()
        assert all(torch.equal(a, b) for a, b in zip(step(), expected))
