"""Races by repetition: sums that programs finish together, under load, on streams, from threads.

The counters and scratch of a launch are shared by the launches of a stream, never between streams.
A race shows as a result that differs, in any bit, from the first one, which the oracle has checked.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from triton.runtime.errors import OutOfResources

import vaekl
from vaekl import _plans
from vaekl.backends import layout as geometry
from vaekl.backends import triton as launcher
from vaekl.backends.workspace import workspaces
from vaekl.reference import Oracle
from vaekl.testing import KL_BUDGET, kl_of_mean_bound, make_inputs, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

#: Shape, reduction, mean_over; programs along the columns, the rows, both.
CASES = [
    ((33, 40_000), "none", "all"),
    ((33, 40_000), "batchmean", "batch"),
    ((4099, 100), "batchmean", "all"),
    ((1000, 700), "none", "batch"),
    ((1000, 700), "batchmean", "batch"),
]
#: A thousand programs of a few elements, which arrive all at once.
CROWD = geometry.Config(tile=128, max_cols=8, small=0, programs=1024)
CROWDED = [((2048, 60), "none", "batch"), ((2048, 60), "batchmean", "all")]


class Case:
    """Inputs of one case, and the results that every launch has to repeat."""

    def __init__(self, shape, reduction, mean_over, device):
        self.mu, self.logvar = make_inputs(shape, device=device)
        self.options = {"reduction": reduction, "mean_over": mean_over}
        self.mu.requires_grad_()
        self.logvar.requires_grad_()
        self.expected = (*self.forward(), *self.both()[3:])

    def forward(self):
        with torch.no_grad():
            return vaekl.reparameterize_kl(
                self.mu, self.logvar, seed=3, backend="triton", **self.options
            )

    def both(self):
        """(z, kl, kl_of_mean, dmu, dlogvar)"""
        out = vaekl.reparameterize_kl(
            self.mu, self.logvar, seed=3, backend="triton", **self.options
        )
        upstream = [torch.ones_like(o) for o in out]
        return (*out, *torch.autograd.grad(tuple(out), (self.mu, self.logvar), upstream))

    def differences(self, results):
        """How many results differ from the first, on the device: nothing waits."""
        pairs = zip(results, self.expected)
        return torch.stack([(a.detach() != b).any() for a, b in pairs]).sum()

    def check(self):
        """The first result against the oracle."""
        oracle = Oracle(self.mu, self.logvar, **self.options)
        _, kl, kl_of_mean = self.expected[:3]
        assert worst(kl, oracle.kl, KL_BUDGET[torch.float32] * oracle.kl) <= 1
        assert worst(kl_of_mean, oracle.kl_of_mean, kl_of_mean_bound(oracle, kl.dtype)) <= 1


def counters_are_zero():
    torch.cuda.synchronize()
    return not any(counters.any() for counters in workspaces.counters.values())


@pytest.fixture
def load(device):
    """Makes another stream busy with memory traffic: programs arrive in ever new orders."""
    stream = torch.cuda.Stream()
    values = torch.randn(2**26, device=device)
    stream.wait_stream(torch.cuda.current_stream())

    def more():
        with torch.cuda.stream(stream):
            for _ in range(10):
                values.sin_()

    yield more
    torch.cuda.synchronize()


def repeat(case, load, count, at_once=20):
    """Launches back to back, compared a batch at a time so that nothing comes between them."""
    case.check()
    wrong = torch.zeros((), dtype=torch.int64, device=case.mu.device)
    for _ in range(count // at_once):
        load()
        for results in [case.forward() for _ in range(at_once)]:
            wrong += case.differences(results)
    return wrong.item()


@pytest.mark.parametrize(("shape", "reduction", "mean_over"), CASES)
def test_two_thousand_launches_under_load(shape, reduction, mean_over, load, device):
    assert repeat(Case(shape, reduction, mean_over, device), load, 2000) == 0
    assert counters_are_zero()


@pytest.mark.parametrize(("shape", "reduction", "mean_over"), CROWDED)
def test_a_crowd_of_small_programs(shape, reduction, mean_over, load, device):
    with _plans.use_config(CROWD):
        grid = geometry.grid(*shape, CROWD)
        assert grid.tiles > 4
        assert grid.ranges > 100
        assert repeat(Case(shape, reduction, mean_over, device), load, 2000) == 0
    assert counters_are_zero()


def work(cases, stream, count, first=0):
    """Differences in `count` forward and backward passes on a stream."""
    with torch.cuda.stream(stream):
        wrong = torch.zeros((), dtype=torch.int64, device=cases[0].mu.device)
        for i in range(count):
            case = cases[(first + i) % len(cases)]
            wrong += case.differences(case.both())
        return wrong


def test_streams_at_once(device):
    """Four streams take turns from one thread, so that their launches overlap on the device."""
    cases = [Case(*case, device) for case in CASES]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    wrong = []
    for i in range(500):
        wrong += [work(cases, stream, 1, first=i + j) for j, stream in enumerate(streams)]
    torch.cuda.synchronize()
    assert sum(w.item() for w in wrong) == 0
    used = {stream for _, stream in workspaces.counters}
    assert {stream.cuda_stream for stream in streams} <= used
    assert counters_are_zero()


@pytest.mark.parametrize("shared", [False, True], ids=["own stream each", "one stream"])
def test_threads_at_once(shared, device):
    cases = [Case(*case, device) for case in CASES]
    torch.cuda.synchronize()
    current = torch.cuda.current_stream()
    streams = [current if shared else torch.cuda.Stream() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(work, cases, stream, 250, i) for i, stream in enumerate(streams)]
        wrong = [future.result() for future in futures]
    torch.cuda.synchronize()
    assert [w.item() for w in wrong] == [0] * 4
    assert counters_are_zero()


@pytest.mark.skipif(
    not hasattr(torch.Generator, "philox_state"), reason="this torch has no draw in one step"
)
def test_keys_and_torchs_own_draws_share_no_words(device):
    """Two threads on one generator: it has moved on by what both took."""
    zeros = torch.zeros(4, 4, device=device)
    generator = torch.cuda.default_generators[zeros.device.index]
    draws = {
        "vaekl": lambda: vaekl.reparameterize(zeros, zeros, backend="triton"),
        "torch": lambda: torch.randn(4, device=device),
    }

    def moved(names):
        start = generator.get_offset()
        with ThreadPoolExecutor(len(names)) as pool:
            run = lambda name: [draws[name]() for _ in range(2000)]  # noqa: E731
            list(pool.map(run, names))
        return generator.get_offset() - start

    assert moved(["vaekl", "torch"]) == moved(["vaekl"]) + moved(["torch"])


def test_a_launch_that_the_device_refuses(device):
    """2048 threads a block are too many; the next call is as if nothing had happened."""
    case = Case(*CASES[-1], device)
    for _ in range(20):
        with (
            _plans.use_config(geometry.Config(threads=2048)),
            pytest.raises((OutOfResources, RuntimeError)),
        ):
            case.forward()
        assert case.differences(case.forward()) == 0
    assert counters_are_zero()


def test_an_interrupt_right_after_a_launch(device, monkeypatch):
    """Control-C with the kernel under way, whose counters go back to the allocator while in use."""
    case = Case(*CASES[-1], device)

    def interrupted(launch):
        def call(*arguments):
            launch(*arguments)
            raise KeyboardInterrupt

        return call

    for _ in range(200):
        with monkeypatch.context() as patch:
            for plan in _plans.planned():
                if isinstance(plan, launcher._ForwardPlan) and plan.launch.compiled is not None:
                    patch.setattr(plan.launch, "compiled", interrupted(plan.launch.compiled))
            with pytest.raises(KeyboardInterrupt):
                case.forward()
        assert case.differences(case.forward()) == 0
    assert counters_are_zero()
