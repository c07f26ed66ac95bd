"""torch.compile with CUDA graphs; what else torch brings is tested on any device.

test_compile.py, test_autocast.py and the others run on device tensors where
there is a device; graphs captured by hand are in test_gpu_graphs.py.
"""

import warnings

import pytest
import torch
from torch._dynamo.utils import counters

import vaekl
from vaekl.backends.workspace import workspaces
from vaekl.testing import make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch._dynamo.reset()


def steps(function, count, device):
    """(z, kl, kl_of_mean, dmu, dlogvar) of `count` steps, copied out of the graphs' memory."""
    mu, logvar = (t.requires_grad_() for t in make_inputs((200, 70), device=device))
    upstream = [torch.ones(s, device=device) for s in ((200, 70), (), ())]
    kept = []
    for _ in range(count):
        torch.compiler.cudagraph_mark_step_begin()
        out = function(mu, logvar)
        slopes = torch.autograd.grad(out, (mu, logvar), upstream)
        kept.append([t.detach().clone() for t in (*out, *slopes)])
    return mu.detach(), logvar.detach(), kept


GRAPHS = pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])


@GRAPHS
def test_reduce_overhead_draws_anew_at_each_replay(device, mode):
    """And the gradients are those of its own noise."""
    call = lambda m, v: tuple(vaekl.reparameterize_kl(m, v))  # noqa: E731
    compiled = torch.compile(call, mode=mode, fullgraph=True)
    mu, logvar, kept = steps(compiled, 20, device)
    _, _, ((_, kl, kl_of_mean, dmu, _),) = steps(call, 1, device)
    z = torch.stack([step[0] for step in kept])
    assert len(z.flatten(1)[:, :8].cpu().unique(dim=0)) == 20
    means = logvar.mean(0).expm1() + logvar.expm1()
    for step in kept:
        for one, expected in zip(step[1:4], (kl, kl_of_mean, dmu)):
            torch.testing.assert_close(one, expected)
        slope = 0.5 * (step[0] - mu + means / len(mu))
        torch.testing.assert_close(step[4], slope, rtol=1e-5, atol=1e-5)


@GRAPHS
def test_reduce_overhead_with_a_seed_is_the_eager_call(device, mode):
    call = lambda m, v: tuple(vaekl.reparameterize_kl(m, v, seed=3))  # noqa: E731
    compiled = torch.compile(call, mode=mode, fullgraph=True)
    _, _, kept = steps(compiled, 6, device)
    _, _, (expected,) = steps(call, 1, device)
    for step in kept:
        assert all(torch.equal(a, b) for a, b in zip(step, expected))


def test_reduce_overhead_repeats_after_manual_seed(device):
    call = lambda m, v: tuple(vaekl.reparameterize_kl(m, v))  # noqa: E731
    compiled = torch.compile(call, mode="reduce-overhead", fullgraph=True)
    steps(compiled, 5, device)  # warm-up and capture
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(steps(compiled, 4, device)[2])
    for one, other in zip(*runs):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_nothing_of_a_callers_memory_pool_is_kept(device):
    """Scratch and counters outlive the call; the pool must not, nor must its memory."""
    mu, logvar = make_inputs((200, 70), device=device)
    expected = [t.clone() for t in vaekl.reparameterize_kl(mu, logvar, seed=3)]
    workspaces.scratch.clear()
    workspaces.forget()
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        out = vaekl.reparameterize_kl(mu, logvar, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(out, expected))
    assert workspaces.counters
    states = lambda: [b["state"] for segment in pool.snapshot() for b in segment["blocks"]]  # noqa: E731
    assert "active_allocated" in states()
    del out
    assert "active_allocated" not in states()


def test_noise_under_vmap_is_drawn_on_the_device(device):
    """The host never waits for a key."""
    zeros = torch.zeros(4, 2, 3, device=device)
    call = torch.func.vmap(
        lambda m: vaekl.reparameterize(m, torch.zeros_like(m)), randomness="different"
    )
    call(zeros)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        z = call(zeros)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(z.unique()) == 24
