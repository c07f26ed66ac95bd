"""The cpu backend: its noise, threads, forks, and its rounding to half precision."""

import multiprocessing
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from vaekl.kernels import cpu as kernels

import vaekl
from vaekl import _plans, _validate
from vaekl.backends import threads as teams
from vaekl.reference import SEED_OFFSET, normal, to_numpy
from vaekl.testing import EPS_BUDGET, make_inputs, step

# 48 pieces in 3 column tiles; 14 pieces of rows that are padded.
LARGE = [(200, 5000), (9999, 21)]


@pytest.fixture
def threads():
    """torch.set_num_threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results(shape=LARGE[0], **options):
    """And gradients, of one call."""
    options |= {"seed": 3, "backend": "cpu"}
    return step(lambda m, v: vaekl.reparameterize_kl(m, v, **options), make_inputs(shape)).tensors


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_auto_takes_it_for_cpu_tensors():
    assert _validate.resolve_backend("auto", torch.device("cpu")) == "cpu"
    with pytest.raises(ValueError, match="backend='cpu' needs tensors on the CPU, got cuda"):
        _validate.resolve_backend("cpu", torch.device("cuda", 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("event", [1, 2, 10, 20, 37, 512, kernels.BLOCK + 1, 2 * kernels.BLOCK + 1])
def test_noise_of_every_width(event, dtype):
    """One column and many, padded or not, several rows a block and several tiles a row."""
    zero = torch.zeros(301, event, dtype=dtype)
    eps = to_numpy(vaekl.reparameterize(zero, zero, seed=-5, backend="cpu"))
    assert np.max(np.abs(eps - normal(-5, SEED_OFFSET, 301, event))) <= EPS_BUDGET[dtype]


@pytest.fixture
def workers(monkeypatch):
    """How many threads worked on each kernel call of one test."""
    counted = []

    def spied(kernel):
        def run(parallel, count, memories, plan, scratch, *addresses):
            kernel.run(parallel, count, memories, plan, scratch, *addresses)
            counted.append(int(scratch.view(np.int64)[kernels.WORKERS]))

        return kernel._replace(run=run)

    for name in ("FORWARD", "BACKWARD", "STATISTICS"):
        monkeypatch.setattr(kernels, name, spied(getattr(kernels, name)))
    _plans.forget()
    yield counted
    _plans.forget()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("mean_over", ["batch", "all"])
@pytest.mark.parametrize("shape", LARGE)
def test_threads_do_not_change_a_bit(shape, reduction, mean_over, threads, workers):
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(results(shape, reduction=reduction, mean_over=mean_over))
    assert workers == [1, 1, 2, 2, 3, 3]
    assert equal(found[0], found[1])
    assert equal(found[0], found[2])


# One row or column or none of either, one piece and just too much for one, a block and a bit more.
SIZES = [(3, 4), (1, 5), (33, 17), (7, 1), (1, 1), (2, 2), (3276, 5), (2048, 8), (2049, 8),
         (2, kernels.BLOCK), (2, kernels.BLOCK + 1), (1, 9), (9, 1), (40, 30)]  # fmt: skip
KINDS = {
    "two tensors": make_inputs,
    "one log variance": lambda shape: [make_inputs(shape)[0], torch.ones(()).expand(shape)],
    "and eps": lambda shape: [*make_inputs(shape), make_inputs(shape, dtype=torch.bfloat16)[0]],
    "rows of halves": lambda shape: [torch.cat(make_inputs(shape))],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mean_over", [None, "batch", "all"])
@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean"])
def test_sizes_in_any_order(reduction, mean_over, kind):
    """A plan made for one size serves others; what came first does not show."""
    options = {"reduction": reduction, "backend": "cpu", "clamp": (-2, 1)}
    options |= {"kl_of_mean": False} if mean_over is None else {"mean_over": mean_over}

    def function(first, second=None, eps=None):
        noise = {"seed": 3} if eps is None else {"eps": eps}
        if second is None:
            return vaekl.reparameterize_kl_moments(first, dim=0, batch_dims=1, **noise, **options)
        return vaekl.reparameterize_kl(first, second, **noise, **options)

    def call(shape, is_number):
        inputs, upstream = KINDS[kind](shape), None
        if is_number:  # as of sum().backward()
            outputs = function(*inputs)
            upstream = [None if o is None else o.new_ones(()).expand(o.shape) for o in outputs]
        return step(function, inputs, upstream).tensors

    calls = [(shape, is_number) for shape in SIZES for is_number in (False, True)]
    alone = {}
    for one in calls:
        _plans.forget()
        alone[one] = call(*one)
    for order in (calls, calls[::-1], sorted(calls), sorted(calls, key=lambda call: call[0][::-1])):
        _plans.forget()
        for one in order:
            assert equal(call(*one), alone[one]), one


def test_large_inputs_agree_with_eager():
    """Several pieces, both along rows and columns."""
    for shape in LARGE:
        mu, logvar = make_inputs(shape)
        for options in ({"reduction": "none"}, {"mean_over": "all"}):
            ours, eager = (
                vaekl.reparameterize_kl(mu, logvar, seed=3, backend=backend, **options)
                for backend in ("cpu", "eager")
            )
            for a, b in zip(ours, eager):
                torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("shape", LARGE)
def test_statistics_of_several_tiles_and_ranges(shape, threads, workers):
    mu, logvar = make_inputs(shape)
    for count in (1, 2, 3):
        threads(count)
        ours, eager = (vaekl.diagnose(mu, logvar, backend=backend) for backend in ("cpu", "eager"))
        assert ours.kl == pytest.approx(eager.kl, rel=1e-12)
        for name in ("mean_mu", "var_mu", "kl_dims"):
            torch.testing.assert_close(
                getattr(ours, name), getattr(eager, name), rtol=1e-11, atol=1e-11
            )
    assert workers == [1, 2, 3]


def test_small_inputs_stay_in_the_calling_thread(threads, workers):
    threads(2)
    results((128, 20))
    assert workers == [1, 1]


@pytest.mark.skipif(
    not teams._PARALLEL or not Path("/proc/self/status").exists(),
    reason="torch has no OpenMP that GOMP_parallel is in, or nothing counts threads",
)
def test_threads_are_those_of_torch(threads):
    """No thread is started for a kernel that torch has not started already."""
    threads(2)
    results((4, 4))  # autograd's own thread starts with its first call
    torch.randn(1000, 1000).exp()  # on all of torch's threads
    before = _thread_count()
    results()
    assert _thread_count() <= before  # one of an earlier, larger team may still be ending


def _thread_count():
    return int(re.search(r"Threads:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_without_openmp(monkeypatch, threads, workers):
    """The calling thread does it all."""
    threads(2)
    expected = results()
    monkeypatch.setattr(teams, "_PARALLEL", 0)
    assert equal(results(), expected)
    assert workers == [2, 2, 1, 1]


def test_several_python_threads_at_once(threads):
    threads(2)
    expected = [results(shape) for shape in (*LARGE, (128, 20))]
    found = {}

    def work(i):
        found[i] = [[results(shape) for shape in (*LARGE, (128, 20))] for _ in range(3)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for repeat in (repeat for repeats in found.values() for repeat in repeats):
        assert all(equal(a, b) for a, b in zip(repeat, expected))


def _forked(inputs, workers, queue):
    # What torch runs on several threads (here: poisoning memory) hangs in a forked child.
    torch.use_deterministic_algorithms(False)
    workers.clear()
    results = vaekl.reparameterize_kl(*inputs, seed=3, backend="cpu")
    queue.put(([t.numpy() for t in results], workers))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_after_first_use(threads, workers):
    """The child has none of the parent's threads, and makes its own."""
    threads(2)
    inputs = make_inputs(LARGE[0])
    expected = vaekl.reparameterize_kl(*inputs, seed=3, backend="cpu")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_forked, args=(inputs, workers, queue), daemon=True)
    child.start()
    try:
        results, counted = queue.get(timeout=600)  # for a child that hangs, not a slow one
    finally:
        child.kill()
    assert equal(map(torch.from_numpy, results), expected)
    assert workers == counted == [2]


class _Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        zero = torch.zeros(200, 300)
        return vaekl.reparameterize(zero, zero, seed=index, backend="cpu")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_in_the_workers_of_a_data_loader():
    alone = [_Noisy()[i] for i in range(4)]
    loader = torch.utils.data.DataLoader(
        _Noisy(), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    assert equal(alone, list(loader))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_as_torch_converts(dtype):
    """Every value in, and out again, bit by bit; and rounding where float32 falls in between."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    low = torch.full_like(every, -1e4 if dtype == torch.float16 else -1e9)[:, None]
    z = vaekl.reparameterize(every[:, None], low, seed=1, backend="cpu").flatten()
    torch.testing.assert_close(z, every, rtol=0, atol=0, equal_nan=True)
    # dmu = dz for z alone, so a float32 dz would not do: kl's gradient g mu rounds g mu.
    mu = every.nan_to_num(0, 0, 0)[:, None].requires_grad_()
    kl = vaekl.kl_loss(mu, torch.zeros_like(mu), reduction="none", backend="cpu")
    for g in (1 / 3, 1e-3, 1.7, 3e4, 0.5, 0.75):
        (found,) = torch.autograd.grad(kl, mu, torch.full_like(kl, g), retain_graph=True)
        expected = (torch.tensor(g) * mu.detach().float()).to(dtype)
        assert torch.equal(found, expected)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages to ask for"
)
def test_large_results_lie_on_huge_pages():
    """The kernel is asked for them: "hg" among the flags of the memory that holds z."""
    mu, logvar = (torch.zeros(1024, 4096) for _ in range(2))
    z = vaekl.reparameterize(mu, logvar, backend="cpu")
    middle = z.data_ptr() + z.nbytes // 2
    flags = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        area = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if area is not None:
            holds = int(area[1], 16) <= middle < int(area[2], 16)
        elif holds and line.startswith("VmFlags:"):
            flags = line.split()[1:]
    assert flags is not None
    assert "hg" in flags


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("upstream", ["contiguous", "transposed", "every other", "expanded"])
def test_elementwise_kl(upstream, dtype, threads):
    """Samples of one element: a KL and an upstream gradient for each, in whatever layout."""
    threads(2)
    torch.manual_seed(0)
    shape = (300, 170)
    mu, logvar = (t.requires_grad_() for t in make_inputs(shape, dtype=dtype))
    if upstream == "transposed":
        mu, logvar = mu.t(), logvar.t()
    g = {
        "contiguous": lambda: torch.randn(*shape, dtype=dtype),
        "transposed": lambda: torch.randn(*shape, dtype=dtype).t(),
        "every other": lambda: torch.randn(300, 340, dtype=dtype)[:, ::2],
        "expanded": lambda: torch.full((), 0.3, dtype=dtype).expand(shape),
    }[upstream]()
    kl = vaekl.kl_loss(mu, logvar, batch_dims=2, reduction="none", backend="cpu")
    m, v = mu.detach().double(), logvar.detach().double()
    torch.testing.assert_close(kl.double(), (m * m + v.expm1() - v) / 2, rtol=2e-6, atol=0)
    dmu, dlogvar = torch.autograd.grad(kl, (mu, logvar), g)
    assert torch.equal(dmu, g * mu)
    torch.testing.assert_close(dlogvar.double(), g.double() * v.expm1() / 2, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2500, 7), (33, 500), (700, 60), (9, 3000)])
def test_transposed(shape, dtype):
    """Read and written along columns: to the bit as rows are, several blocks and tiles of them."""
    inputs = make_inputs(shape, dtype=dtype)
    torch.manual_seed(0)
    dz, dkl = torch.randn(shape).to(dtype), torch.randn(shape[0])
    options = {"seed": 1, "reduction": "none", "kl_of_mean": False, "backend": "cpu"}
    call = lambda m, v: vaekl.reparameterize_kl(m, v, **options)  # noqa: E731
    plain, turned = (
        step(call, [form(t) for t in inputs], (form(dz), dkl, None)).tensors
        for form in (lambda t: t, lambda t: t.t().contiguous().t())
    )
    assert equal(plain, turned)


@pytest.mark.parametrize("needs", ["both", "mu", "logvar"])
@pytest.mark.parametrize(
    ("shape", "axis", "launches"), [((3, 8, 48, 50), 1, 3), ((2, 2, 9, 48, 50), 2, 4)]
)
def test_a_kl_for_each_pixel(shape, axis, launches, needs, workers):
    """Slices are launched in place; to the bit as a copy with the channels last is."""
    torch.manual_seed(0)
    inputs = make_inputs(shape)
    dims = len(shape) - 1
    dkl = torch.randn([n for i, n in enumerate(shape) if i != axis])
    results = []
    for copied in (False, True):
        mu, logvar = (t.detach().movedim(axis, -1) for t in inputs)
        if copied:
            mu, logvar = mu.contiguous(), logvar.contiguous()
        wanted = {"both": [mu, logvar], "mu": [mu], "logvar": [logvar]}[needs]
        for t in wanted:
            t.requires_grad_()
        workers.clear()
        kl = vaekl.kl_loss(mu, logvar, batch_dims=dims, reduction="none", backend="cpu")
        assert kl.is_contiguous()
        results.append([kl, *torch.autograd.grad(kl, wanted, dkl)])
        assert len(workers) == (2 if copied else 2 * launches)
        if not copied:
            assert all(g.stride() == t.stride() for g, t in zip(results[0][1:], wanted))
    assert equal(*results)
