"""The eager backend's own ways: large tensors by blocks, and devices that lack float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vaekl import _check
from vaekl._spec import Needs, Operands, Outputs, Source, Spec
from vaekl.backends import eager
from vaekl.testing import make_inputs, step


@pytest.fixture(params=[3, 50, 200])
def block(request, monkeypatch):
    """A block of so many elements for each thread: parts of rows, a row, and several."""
    monkeypatch.setattr(eager, "_BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("case", _check.CASES, ids=str)
def test_values_by_blocks(case, block):
    assert _check.check_case(case, "eager", "cpu").problem is None


@pytest.mark.parametrize("mean_over", ["batch", "all"])
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
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
    monkeypatch.setattr(eager, "_BLOCK", 20)
    for a, b in zip(step(call, tensors).tensors, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
        assert a.stride() == b.stride()


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
