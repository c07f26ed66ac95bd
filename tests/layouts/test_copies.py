"""reparameterize_kl_moments in memory: no copies, one gradient tensor."""

import torch

import vaekl
from vaekl.testing import large_operators, step

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


def without_casts(names):
    """Less the copy that each change of dtype is."""
    left, casts = [], 0
    for name in names:
        if name == "copy_" and casts:
            casts -= 1
            continue
        casts = 1 if name == "_to_copy" else casts
        left.append(name)
    return left


def test_no_copies_and_one_gradient(backend, device, launches_thrown_away):
    """Operators on tensors as large as one half, by torch's profiler, forward and backward.

    The profiler's list is of the path that users take (no dispatch mode is active), and its
    allocations are counted: z, and one gradient of the size of moments. The eager backend has
    temporaries, and copies nothing either but to another dtype.
    """
    for moments, dim, batch_dims in in_place_moments(device):
        half = moments.numel() // 2
        dz = torch.randn_like(moments.narrow(dim, 0, moments.shape[dim] // 2))
        upstream = (dz, torch.ones((), device=device), None)
        options = {"dim": dim, "batch_dims": batch_dims, "kl_of_mean": False, "backend": backend}

        def call(moments=moments, upstream=upstream, options=options):
            return step(
                lambda m: vaekl.reparameterize_kl_moments(m, **options), [moments], upstream
            )

        call()  # plans and compiles
        found = large_operators(call, half)
        names = [name for name, _ in found]
        if backend == "eager":
            names = without_casts(names)
        assert not MOVES & set(names), (backend, moments.shape, dim, found)
        sizes = [allocated for _, allocated in found if allocated]
        # Halves in float64 are as large as moments: phi has two.
        assert sizes.count(moments.numel() * 4) == (3 if backend == "eager" else 1)
        if backend != "eager":
            assert sorted(sizes) == [half * 4, moments.numel() * 4]


def test_the_count_sees_what_halves_cost_otherwise(backend, device, launches_thrown_away):
    """The check above, on chunk and two gradients: it does find the cat."""
    moments = torch.randn(8, 64, device=device)
    upstream = (torch.ones(8, 32, device=device), None, None)
    options = {"kl_of_mean": False, "backend": backend}

    def call():
        return step(
            lambda m: vaekl.reparameterize_kl(*m.chunk(2, 1), **options), [moments], upstream
        )

    call()
    names = {name for name, _ in large_operators(call, moments.numel() // 2)}
    assert {"chunk", "cat"} <= names
