"""DDP, FSDP2 and DTensor over two gloo processes: as one process with the batch and its eps."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import vaekl

WORLD, BATCH, STEPS = 2, 8, 4


class VAE(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.encoder = torch.nn.Linear(6, 8)
        self.decoder = torch.nn.Linear(4, 6)
        self.inner = vaekl.nn.ReparameterizeKL(backend=backend, kl_of_mean=False)

    def forward(self, images, eps):
        mu, logvar = self.encoder(images).chunk(2, dim=-1)
        z, kl, _ = self.inner(mu, logvar, eps=eps)
        return (self.decoder(z) - images).square().sum(-1).mean() + kl


def train(wrap, backend, rank, world):
    """STEPS steps of Adam on this rank's rows; the weights after them, whole."""
    torch.manual_seed(0)
    model = wrap(VAE(backend))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    images, eps = torch.randn(STEPS, BATCH, 6), torch.randn(STEPS, BATCH, 4)
    rows = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(images[step, rows], eps[step, rows]).backward()
        optimizer.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def check_training(rank, backend):
    expected = train(lambda model: model, backend, 0, 1)
    mesh = init_device_mesh("cpu", (WORLD,))
    for wrap in (DistributedDataParallel, lambda model: fully_shard(model, mesh=mesh)):
        for a, b in zip(train(wrap, backend, rank, WORLD), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # Rows that the other rank has do matter.
    alone = train(lambda model: model, backend, rank, WORLD)
    assert not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(alone, expected))


def check_noise(rank, backend):
    """Each rank's own where each has seeded itself, as any random operation."""
    torch.manual_seed(rank)
    zeros = torch.zeros(2, 3)
    mine = vaekl.reparameterize(zeros, zeros, backend=backend)
    every = [torch.empty(2, 3) for _ in range(WORLD)]
    dist.all_gather(every, mine)
    assert not torch.equal(*every)


def check_sharded_tensors(rank, backend):
    """DTensors go through plain operations: what is reduced is reduced over ranks."""
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    whole = [torch.randn(4, 6, requires_grad=True) for _ in range(3)]
    shards = [distribute_tensor(t.detach(), mesh, [Shard(0)]).requires_grad_() for t in whole]
    found = []
    for mu, logvar, eps in (whole, shards):
        z, kl, kl_of_mean = vaekl.reparameterize_kl(mu, logvar, eps=eps, backend=backend)
        total = z.sin().sum() + 2 * kl + 3 * kl_of_mean
        gradients = torch.autograd.grad(total, (mu, logvar, eps))
        results = (z, kl, kl_of_mean, *gradients)
        found.append([t.full_tensor() if isinstance(t, DTensor) else t for t in results])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    torch.manual_seed(rank)
    drawn = vaekl.reparameterize(shards[0], shards[1], backend=backend)
    torch.manual_seed(rank)
    eps = torch.randn_like(shards[0])  # the noise that torch gives a sharded tensor
    assert drawn.placements == (Shard(0),)
    expected = shards[0] + (0.5 * shards[1]).exp() * eps
    torch.testing.assert_close(drawn.full_tensor(), expected.full_tensor())
    for noise in ({"seed": 3}, {"generator": torch.Generator()}):
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            vaekl.reparameterize(*shards[:2], backend=backend, **noise)


def work(rank, meeting, backend):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    try:
        for check in (check_training, check_noise, check_sharded_tensors):
            check(rank, backend)
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path):
    """All of the above, in processes started once: to import torch takes longer than they do."""
    mp.spawn(work, (tmp_path / "meeting", "cpu"), nprocs=WORLD)
