"""The eager backend's own ways: large tensors by blocks, and devices that lack float64."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vaekl
from storages import PACKED
from vaekl import _check
from vaekl._noise import philox_normal
from vaekl._spec import Key, Needs, Operands, Outputs, Source, Spec
from vaekl.backends import eager
from vaekl.testing import make_inputs, step


class Blocks:
    """Makes blocks of so many elements, and counts those that are worked on."""

    def __init__(self, monkeypatch, size):
        self.count, self._blocks = 0, eager._blocks
        monkeypatch.setattr(eager, "_block", lambda: size)
        monkeypatch.setattr(eager, "_blocks", self)

    def __call__(self, batch, event):
        for block in self._blocks(batch, event):
            self.count += 1
            yield block


@pytest.mark.parametrize("size", [3, 50, 200])  # parts of rows, a row, and several
@pytest.mark.parametrize("case", [c for c in _check.CASES if not c.has_prior], ids=str)
def test_values_by_blocks(case, size, monkeypatch):
    blocks = Blocks(monkeypatch, size)
    assert _check.check_case(case, "eager", "cpu").problem is None
    if case.layout == "contiguous" and math.prod(case.shape) > size:
        assert blocks.count >= 2 * math.prod(case.shape) / size  # forward and backward
    else:
        assert blocks.count == 0


@pytest.mark.parametrize("mean_over", ["batch", "all"])
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean", "per_dim"])
@pytest.mark.parametrize("batch_dims", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"clamp": (-1.0, 0.5)}, {"kl_of_mean": False}, "eps"])
def test_blocks_are_the_whole(options, batch_dims, reduction, mean_over, storage, monkeypatch):
    tensors = storage.store(*make_inputs((5, 13, 4), dtype=torch.float64))
    if options == "eps":
        tensors, options = [*tensors, make_inputs((5, 13, 4), dtype=torch.float64)[1]], {}
    options = options | {"batch_dims": batch_dims, "reduction": reduction, "mean_over": mean_over}

    def call(*tensors):
        torch.manual_seed(2)
        return storage.call(*tensors, backend="eager", **options)

    whole = step(call, tensors).tensors
    blocks = Blocks(monkeypatch, 20)
    for a, b in zip(step(call, tensors).tensors, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
        assert a.stride() == b.stride()
    # Halves of moments are no [B, D] where the axis that they share is the batch's.
    assert (blocks.count > 13) == (storage is not PACKED or batch_dims == 1)


@pytest.mark.parametrize("size", [20, 1000])
@pytest.mark.parametrize("batch_dims", [1, 2])
def test_results_may_be_written_to(batch_dims, size, monkeypatch):
    """Autograd lets nobody write to a view that a Function gives."""
    Blocks(monkeypatch, size)
    mu, logvar = (t.requires_grad_() for t in make_inputs((5, 13, 4)))
    options = {"reduction": "none", "batch_dims": batch_dims, "backend": "eager"}
    outputs = vaekl.reparameterize_kl(mu, logvar, **options)
    sum(output.mul_(2.0).sum() for output in outputs).backward()


def test_a_default_device_does_not_matter(monkeypatch):
    mu, logvar = make_inputs((5, 13))
    Blocks(monkeypatch, 20)
    with torch.device("meta"):
        for reduction in ("none", "sum"):
            found = vaekl.reparameterize_kl(
                mu, logvar, seed=1, backend="eager", reduction=reduction
            )
            assert all(tensor.device.type == "cpu" for tensor in found)


class _Made(TorchDispatchMode):
    """The dtypes that are made on a device."""

    def __init__(self, device):
        super().__init__()
        self.device, self.dtypes = device, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (list, tuple)) else [results]:
            if isinstance(result, torch.Tensor) and result.device.type == self.device:
                self.dtypes.add(result.dtype)
        return results


def test_no_float64_on_a_device_that_may_have_none():
    spec = Spec(True, "batchmean", "batch", 1, "logvar", None, "eager", False, None)
    with FakeTensorMode(), _Made("mps") as made:
        mu, logvar = (torch.empty(4, 6, device="mps") for _ in range(2))
        x = Operands(mu, logvar, None)
        outputs, saved = eager.forward(spec, x)(x, Source(None, 5))
        upstream = Outputs(*outputs)
        found = eager.backward(spec, x, upstream, Needs(True, True, False), None)(
            x, saved, upstream, None
        )
        assert all(t.device.type == "mps" for t in (*outputs, saved.noise, *found[:2]))
        statistics = eager.statistics(mu, logvar, 1)
        assert statistics.dtype == torch.float64
    assert torch.float32 in made.dtypes
    assert torch.float64 not in made.dtypes


def test_noise_of_a_key_on_such_a_device():
    with FakeTensorMode():
        key = Key(0, 0, torch.empty(2, dtype=torch.int64, device="mps"))
        noise = philox_normal(key, (3, 5), torch.float32, key.on_device.device)
        assert (noise.device.type, noise.dtype) == ("mps", torch.float32)


def test_shapes_alone():
    """Of meta tensors under a transform, whose keys are on their device."""
    mu, logvar = (torch.empty(3, 4, 6, device="meta") for _ in range(2))
    call = lambda m, v: vaekl.reparameterize_kl(m, v, backend="cpu").z  # noqa: E731
    z = torch.func.vmap(call, randomness="different")(mu, logvar)
    assert (z.shape, z.device.type) == (mu.shape, "meta")
