"""The same call gives the same bits, and nothing that is passed in or saved is changed."""

import pytest
import torch
import triton
import triton.language as tl
from vaekl.kernels.reduction import sum_scalars

import vaekl
from vaekl import _plans
from vaekl.backends import triton as launcher
from vaekl.backends.workspace import Workspaces, workspaces
from vaekl.testing import CONFIGS, make_inputs, step


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("mean_over", ["batch", "all"])
def test_repeated_calls_are_bitwise_equal(reduction, mean_over, backend, config, device):
    pair = make_inputs((9, 22), device=device)
    options = {"reduction": reduction, "mean_over": mean_over, "seed": 3, "backend": backend}
    call = lambda m, v: vaekl.reparameterize_kl(m, v, **options)  # noqa: E731
    first = step(call, pair).tensors
    interpreted = backend == "triton" and device == "cpu"  # one program after another
    for _ in range(1 if interpreted else 2):
        for a, b in zip(first, step(call, pair).tensors, strict=True):
            assert torch.equal(a, b)
            assert torch.isfinite(a).all()


def test_inputs_and_saved_tensors_are_not_changed(backend, many_programs, device):
    mu, logvar = make_inputs((5, 12), device=device)
    eps = make_inputs((5, 12), device=device, seed=4)[0]
    tensors = [t.requires_grad_() for t in (mu, logvar, eps)]
    copies = [t.detach().clone() for t in tensors]
    out = vaekl.reparameterize_kl(mu, logvar, eps=eps, clamp=(-1, 1), backend=backend)
    kept = [o.detach().clone() for o in out]
    upstream = [torch.randn_like(o) for o in out]
    sent = [g.clone() for g in upstream]
    torch.autograd.backward(tuple(out), upstream)
    for now, before in zip((*tensors, *out, *upstream), (*copies, *kept, *sent)):
        assert torch.equal(now.detach(), before)


def test_backward_twice(backend, many_programs, device):
    mu, logvar = (t.requires_grad_() for t in make_inputs((5, 12), device=device))
    out = vaekl.reparameterize_kl(mu, logvar, backend=backend)
    upstream = [torch.randn_like(o) for o in out]
    gradients = [
        torch.autograd.grad(tuple(out), (mu, logvar), upstream, retain_graph=True) for _ in range(3)
    ]
    for again in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, gradients[0]))


def test_workspaces_grow():
    fresh = Workspaces()
    cpu = torch.device("cpu")
    for size, count in ((10, 3), (10_000, 3), (10_000, 9_000), (5, 5)):
        scratch, counters = fresh.get(cpu, torch.float32, size, count)
        assert scratch.numel() >= size
        assert counters.numel() >= count
        assert not counters.any()
    assert fresh.get(cpu, torch.float64, 5, 5)[0].dtype == torch.float64


def test_workspaces_come_from_a_thread_without_the_callers_modes(operators):
    """A memory pool, like a mode, is a thread's own; what is kept must not be of the caller's."""
    cpu, fresh = torch.device("cpu"), Workspaces()
    with torch.inference_mode(), operators:
        kept = fresh.get(cpu, torch.float32, 10, 3)
        torch.zeros(2)
    assert operators.names == ["aten.zeros.default"]  # the mode sees, and saw nothing of it
    assert not any(buffer.is_inference() for buffer in kept)


def test_an_allocation_that_fails_is_the_callers_error():
    """And the next call begins anew."""
    cpu, fresh = torch.device("cpu"), Workspaces()
    with pytest.raises(RuntimeError, match="allocate"):
        fresh.get(cpu, torch.float32, 2**60, 3)
    assert fresh.get(cpu, torch.float32, 10, 3)[0].numel() >= 10


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_all_partial_sums_are_added(count, device):
    """More programs than fit one block of the last program."""
    partials = torch.randn(count, dtype=torch.float64, device=device)
    total = torch.empty((), dtype=torch.float64, device=device)
    sum_kernel[(1,)](total, partials, count, enable_fp_fusion=True)
    torch.testing.assert_close(total, partials.sum(), rtol=1e-12, atol=1e-12)


@triton.jit
def sum_kernel(p_total, p_partials, count):
    """sum_scalars alone."""
    tl.store(p_total, sum_scalars(p_partials, count, tl.float64))


def test_counters_are_zero_after_every_launch(device):
    mu, logvar = make_inputs((9, 22), device=device)
    with _plans.use_config(CONFIGS["many"]):
        for reduction in ("none", "mean"):
            for mean_over in ("batch", "all"):
                vaekl.reparameterize_kl(
                    mu, logvar, reduction=reduction, mean_over=mean_over, backend="triton"
                )
                for buffer in workspaces.counters.values():
                    assert not buffer.any()


def test_a_failed_launch_does_not_poison_the_next(device, monkeypatch):
    """Counts left behind by a launch that died half way are thrown away."""
    mu, logvar = make_inputs((9, 22), device=device)
    with _plans.use_config(CONFIGS["many"]):
        expected = vaekl.reparameterize_kl(mu, logvar, seed=1, backend="triton")

        def half_a_launch(*arguments, **options):
            for counters in workspaces.counters.values():
                counters += 1
            raise KeyboardInterrupt

        plans = [plan for plan in _plans.planned() if isinstance(plan, launcher._ForwardPlan)]
        for launch in [plan.launch for plan in plans]:
            monkeypatch.setattr(launch, "kernel", {launch.grid: half_a_launch})
            monkeypatch.setattr(launch, "compiled", None)
        with pytest.raises(KeyboardInterrupt):
            vaekl.reparameterize_kl(mu, logvar, seed=1, backend="triton")
        monkeypatch.undo()
        again = vaekl.reparameterize_kl(mu, logvar, seed=1, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(expected, again))


def test_nothing_is_saved_without_grad(backend, device):
    mu, logvar = (t.requires_grad_() for t in make_inputs((5, 12), device=device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            out = vaekl.reparameterize_kl(mu, logvar, backend=backend)
        assert not saved
        assert not any(o.requires_grad for o in out)
        vaekl.reparameterize_kl(mu.detach(), logvar.detach(), backend=backend)
        assert not saved
        vaekl.reparameterize_kl(mu, logvar, backend=backend)
        assert saved


def test_the_kernels_save_nothing_of_the_inputs_size(storage, backend, device):
    """What is stored, by reference; a key (eager: the noise) and two mean vectors."""
    tensors = [t.requires_grad_() for t in storage.store(*make_inputs((64, 6), device=device))]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        storage.call(*tensors, backend=backend)
    own = {t.data_ptr() for t in tensors}
    assert [t.shape for t in saved if t.data_ptr() in own] == [t.shape for t in tensors]
    others = sorted(t.numel() for t in saved if t.data_ptr() not in own)
    assert others == ([2 * 6, 64 * 6] if backend == "eager" else [2, 2 * 6])


def test_changing_an_input_before_backward_is_noticed(storage, backend, device):
    tensors = [2 * t.requires_grad_() for t in storage.store(*make_inputs((5, 6), device=device))]
    kl = storage.call(*tensors, backend=backend).kl
    tensors[0] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kl.backward()
