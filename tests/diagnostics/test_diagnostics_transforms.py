"""diagnose where tensors have no memory to read; merging to the bit; wrong arguments of plot."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

import vaekl
from vaekl.testing import make_inputs


class Wrapper(torch.Tensor):
    """A subclass that holds another tensor, and no memory itself."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        unwrap = lambda x: x.inner if isinstance(x, cls) else x  # noqa: E731
        result = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, result)


@pytest.fixture
def inputs(device):
    return make_inputs((8, 3), device=device)


def test_under_transforms(inputs, backend):
    """A report beside a loss, and after the transform has ended."""
    mu, logvar = inputs
    expected = vaekl.diagnose(mu, logvar, backend="eager").to_dict(per_dimension=True)

    def loss(mu):
        report = vaekl.diagnose(mu, logvar, backend=backend)
        assert report.to_dict(per_dimension=True) == expected
        reports.append(report)
        return vaekl.kl_loss(mu, logvar)

    reports = []
    torch.func.grad(loss)(mu)
    torch.func.jvp(loss, (mu,), (mu,))
    for report in reports:
        assert report.to_dict(per_dimension=True) == expected
        assert str(report) == str(reports[0])


def test_under_vmap_torch_says_that_there_are_no_values(inputs, backend):
    batch = tuple(t.expand(2, 8, 3) for t in inputs)
    with pytest.raises(RuntimeError, match=r"vmap over calling \.item\(\)"):
        torch.func.vmap(lambda m, v: vaekl.diagnose(m, v, backend=backend))(*batch)


def test_subclasses(inputs, backend):
    report = vaekl.diagnose(*map(Wrapper, inputs), backend=backend)
    assert report.kl == vaekl.diagnose(*inputs, backend="eager").kl


def test_zero_tensors(inputs, backend, device):
    """What autograd calls a gradient of nothing but zeros: no memory either."""
    zeros = torch._efficientzerotensor(8, 3, device=device)
    report = vaekl.diagnose(zeros, inputs[1], backend=backend)
    assert report.kl == pytest.approx(vaekl.diagnose(zeros.clone(), inputs[1]).kl, rel=1e-14)


def test_fake_tensors_are_refused(inputs, backend):
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in inputs]
    with pytest.raises(ValueError, match="mu must have values, got a FakeTensor"):
        vaekl.diagnose(*fakes, backend=backend)
    with pytest.raises(ValueError, match="mu must have values, got a FakeTensor"):
        vaekl.DiagnosticsAccumulator(backend=backend).update(*fakes)


def test_inside_torch_compile(inputs, backend):
    """A graph break, no more: the numbers of a call outside, and no warning of ours."""
    mu, logvar = inputs

    @torch.compile(backend="eager")
    def step(mu, logvar):
        report = vaekl.diagnose(mu, logvar, backend=backend)
        return mu.sum() + report.kl

    expected = mu.sum() + vaekl.diagnose(mu, logvar, backend="eager").kl
    for _ in range(2):
        torch.testing.assert_close(step(mu, logvar), expected)


@pytest.mark.parametrize("count", [3, 7, 40])
def test_merged_batches_of_one_code_have_no_variance(count):
    """Far from 0, where a mean of equal means is another number by rounding."""
    same = torch.full((1, 2), 12345.678), torch.full((1, 2), -29.7)
    accumulator = vaekl.DiagnosticsAccumulator()
    for _ in range(count):
        accumulator.update(*same)
    report = accumulator.report()
    assert report.samples == count
    assert report.var_mu.tolist() == [0.0, 0.0]
    assert report.mean_logvar.tolist() == same[1][0].double().tolist()
    assert report.information_dims.max() < 1e-13


@pytest.mark.parametrize(("most", "error"), [(0, ValueError), (-1, ValueError), ("8", TypeError)])
def test_a_figure_of_no_dimensions_is_refused(inputs, most, error):
    with pytest.raises(error, match="most must be "):
        vaekl.diagnose(*inputs).plot(most=most)
