"""reparameterize_kl_moments in memory: no copies, one gradient tensor, what backward keeps."""

import pytest
import torch

import vaekl
from vaekl.testing import large_operators, make_inputs

# What joining or taking apart gradients, or copying, would show as; on scalars they are harmless.
MOVES = {"cat", "chunk", "split", "split_with_sizes", "copy_", "clone", "contiguous", "zeros",
         "zero_", "slice_backward", "narrow_backward", "select_backward"}  # fmt: skip


def in_place_moments(device):
    """(moments, dim, batch_dims) that are promised to be read in place."""
    yield torch.randn(8, 64, device=device), 1, 1
    yield torch.randn(8, 80, device=device)[:, 10:74], 1, 1
    yield torch.randn(8, 6, device=device), 0, 1
    yield torch.randn(2, 8, 4, 4, device=device), 1, 1
    yield torch.randn(2, 8, 4, 4, device=device).to(memory_format=torch.channels_last), 1, 1
    video = torch.randn(2, 8, 3, 4, 4, device=device)
    yield video, 1, 1
    yield video.to(memory_format=torch.channels_last_3d), 1, 1
    yield torch.randn(3, 4, 16, device=device), -1, 2
    yield torch.randn(3, 4, 16, device=device), -1, 1
    yield torch.randn(16, 4, 3, device=device).permute(2, 1, 0), 2, 1


def test_no_copies_and_one_gradient(backend, device, launches_thrown_away):
    """Operators on tensors as large as one half, by torch's profiler, forward and backward.

    The profiler's list is of the path that users take (no dispatch mode is active), and its
    allocations are counted: z, and one gradient of the size of moments. The eager backend has
    temporaries, each the size of a half, and copies nothing either.
    """
    for moments, dim, batch_dims in in_place_moments(device):
        moments = moments.detach().requires_grad_()
        half = moments.numel() // 2
        dz = torch.randn_like(moments.detach().narrow(dim, 0, moments.shape[dim] // 2))
        one = torch.ones((), device=device)

        def step(moments=moments, dim=dim, batch_dims=batch_dims, dz=dz, one=one):
            z, kl, _ = vaekl.reparameterize_kl_moments(
                moments, dim=dim, batch_dims=batch_dims, kl_of_mean=False, backend=backend
            )
            return z, torch.autograd.grad([z, kl], moments, [dz, one])[0]

        step()  # a first call plans and compiles
        found = large_operators(step, half)
        assert not MOVES & {name for name, _ in found}, (backend, moments.shape, dim, found)
        sizes = [allocated for _, allocated in found if allocated]
        assert sizes.count(moments.numel() * 4) == 1
        if backend != "eager":
            assert sorted(sizes) == [half * 4, moments.numel() * 4]


def test_the_count_sees_what_halves_cost_otherwise(backend, device, launches_thrown_away):
    """The check above, on chunk and two gradients: it does find the cat."""
    moments = torch.randn(8, 64, device=device, requires_grad=True)

    def step():
        z, _, _ = vaekl.reparameterize_kl(*moments.chunk(2, 1), kl_of_mean=False, backend=backend)
        return torch.autograd.grad(z, moments, torch.ones_like(z))

    step()
    names = {name for name, _ in large_operators(step, moments.numel() // 2)}
    assert {"chunk", "cat"} <= names


def test_kept_for_backward(backend, device):
    """moments by reference, not its halves; the key (eager: the noise) and two mean vectors."""
    moments = make_inputs((5, 12), device=device)[0].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        vaekl.reparameterize_kl_moments(moments, backend=backend)
    own = [t for t in kept if t.data_ptr() == moments.data_ptr()]
    assert [t.shape for t in own] == [moments.shape]
    others = sorted(t.numel() for t in kept if t.data_ptr() != moments.data_ptr())
    assert others == ([12, 30] if backend == "eager" else [2, 12])


def test_a_write_before_backward_is_an_error(backend, device):
    moments = make_inputs((5, 12), device=device)[0].requires_grad_()
    inner = moments * 1.0
    kl = vaekl.reparameterize_kl_moments(inner, backend=backend).kl
    with torch.no_grad():
        inner[0, 0] = 3.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kl.backward()
