"""The cpu backend: threads, forks, its cache on disk, and its rounding to half precision."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import vaekl
from vaekl import _threads, _validate
from vaekl.reference import normal, to_numpy
from vaekl.testing import EPS_BUDGET, make_inputs

ROOT = Path(__file__).parents[1]
# 13 pieces in 2 column tiles; 7 pieces of rows that are padded.
LARGE = [(200, 2000), (9999, 21)]
CALL = (
    "import torch, vaekl\n"
    "x = torch.zeros(4, 3, requires_grad=True)\n"
    "z, kl, of_mean = vaekl.reparameterize_kl(x, x, seed=1, backend='cpu')\n"
    "(z.sum() + kl + of_mean).backward()\n"
    "print(z.sum().item(), kl.item())\n"
)


@pytest.fixture
def threads():
    """torch.set_num_threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def step(shape=LARGE[0], dtype=torch.float32, **options):
    """Results and gradients of one call."""
    mu, logvar = (t.requires_grad_() for t in make_inputs(shape, dtype=dtype))
    out = vaekl.reparameterize_kl(mu, logvar, seed=3, backend="cpu", **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).to(o) for o in out]
    return (*out, *torch.autograd.grad(tuple(out), (mu, logvar), upstream))


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second))


def python(code, folder=None, **env):
    """stdout of `code` in a fresh interpreter, warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, cwd=folder or ROOT.parent, env={**os.environ, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


def test_auto_takes_it_for_cpu_tensors(monkeypatch):
    assert _validate.resolve_backend("auto", torch.device("cpu")) == "cpu"
    with pytest.raises(ValueError, match="backend='cpu' needs tensors on the CPU, got cuda"):
        _validate.resolve_backend("cpu", torch.device("cuda", 0))
    monkeypatch.setattr(_validate, "has_numba", lambda: False)
    assert _validate.resolve_backend("auto", torch.device("cpu")) == "eager"
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vaekl\[cpu\]'"):
        _validate.resolve_backend("cpu", torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("event", [1, 2, 10, 20, 37, 512, 1025])
def test_noise_of_every_width(event, dtype):
    """One column and many, padded or not, several rows a block and several tiles a row."""
    zero = torch.zeros(301, event, dtype=dtype)
    eps = to_numpy(vaekl.reparameterize(zero, zero, seed=-5, backend="cpu"))
    assert np.max(np.abs(eps - normal(-5, 0, 301, event))) <= EPS_BUDGET[dtype]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("mean_over", ["batch", "all"])
@pytest.mark.parametrize("shape", LARGE)
def test_threads_do_not_change_a_bit(shape, reduction, mean_over, threads):
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(step(shape, reduction=reduction, mean_over=mean_over))
    assert _threads._pool is not None
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


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


def test_small_inputs_wake_no_thread(monkeypatch, threads):
    threads(2)
    monkeypatch.setattr(_threads, "helpers", lambda count: pytest.fail("a thread was asked for"))
    step((128, 20))


def test_no_thread_to_be_had(monkeypatch, threads):
    """The calling thread does it all."""
    threads(2)
    expected = step()

    def refuse(*args):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_threads.ThreadPoolExecutor, "submit", refuse)
    assert equal(step(), expected)


def test_several_python_threads_at_once(threads):
    threads(2)
    expected = [step(shape) for shape in (*LARGE, (128, 20))]
    results = {}

    def work(i):
        results[i] = [step(shape) for shape in (*LARGE, (128, 20)) for _ in range(3)][::3]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    for found in results.values():
        assert all(equal(a, b) for a, b in zip(found, expected))


def _forked(mu, logvar, queue):
    # What torch runs on several threads (here: poisoning memory) hangs in a forked child.
    torch.use_deterministic_algorithms(False)
    queue.put([t.numpy() for t in vaekl.reparameterize_kl(mu, logvar, seed=3, backend="cpu")])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_after_first_use(threads):
    """The child has no threads of the parent's pool, and makes its own."""
    threads(2)
    mu, logvar = make_inputs(LARGE[0])
    expected = vaekl.reparameterize_kl(mu, logvar, seed=3, backend="cpu")
    assert _threads._pool is not None
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_forked, args=(mu, logvar, queue), daemon=True)
    child.start()
    try:
        found = [torch.from_numpy(a) for a in queue.get(timeout=30)]
    finally:
        child.kill()
    assert equal(found, expected)


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


def test_compiled_code_is_kept_on_disk(tmp_path):
    """A second process compiles nothing; only the dtype in use was compiled."""
    env = {"NUMBA_CACHE_DIR": str(tmp_path)}
    first = python(CALL, **env)
    files = sorted(p.name for p in tmp_path.rglob("*.nbc"))
    assert len(files) == 2, files
    count = (
        "from vaekl.kernels import cpu\n"
        "print(*(sum(k.stats.cache_misses.values()) for k in (cpu.forward, cpu.backward)))\n"
    )
    assert python(CALL + count, **env) == [*first, "0", "0"]
    assert sorted(p.name for p in tmp_path.rglob("*.nbc")) == files


def test_a_change_of_any_source_compiles_again(tmp_path):
    shutil.copytree(ROOT / "vaekl", tmp_path / "vaekl")
    shutil.copytree(ROOT / "kernels", tmp_path / "vaekl" / "kernels")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, vaekl; x = torch.zeros(4, 3); vaekl.kl_loss(x, x, backend='cpu')\n"
        "from vaekl.kernels import cpu; print(*cpu.forward.stats.cache_misses.values(), 0)\n"
    )
    env = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert [python(code, folder=tmp_path, **env)[0] for _ in range(2)] == ["1", "0"]
    os.utime(tmp_path / "vaekl" / "kernels" / "cpu_math.py", (1, 1))
    assert python(code, folder=tmp_path, **env)[0] == "1"


@pytest.mark.parametrize("where", ["folder of its own", "read-only install"])
def test_without_a_folder_to_write_to(where, tmp_path):
    """Nowhere to keep compiled code: it is compiled again, and nothing is said."""
    shutil.copytree(ROOT / "vaekl", tmp_path / "vaekl")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kernels", tmp_path / "vaekl" / "kernels", ignore=ignore)
    blocked = tmp_path / "file"
    blocked.touch()  # a folder cannot be made below a file, not even by root
    (tmp_path / "vaekl" / "kernels" / "__pycache__").touch()
    env = {"HOME": str(blocked), "XDG_CACHE_HOME": str(blocked / "cache")}
    if where == "folder of its own":
        env["NUMBA_CACHE_DIR"] = str(blocked / "numba")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + CALL
    check = f"from vaekl.kernels import cpu; assert cpu.__file__.startswith({str(tmp_path)!r})\n"
    assert python(code + check, folder=tmp_path, **env) == python(CALL)
    assert not list(tmp_path.rglob("*.nbc"))


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
