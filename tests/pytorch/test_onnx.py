"""torch.onnx.export by tracing; tests/peers/test_onnx.py runs what it gives."""

import importlib.util
import io
import sys
import types

import pytest
import torch

import vaekl
from modules import Function
from vaekl.distributions import DiagonalGaussianDistribution
from vaekl.reference import moments_oracle
from vaekl.testing import KL_BUDGET, make_inputs, worst

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # of torch.jit
    pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python:torch.jit.TracerWarning"),
]


def posterior(moments):
    distribution = DiagonalGaussianDistribution(moments)
    return distribution.kl(), distribution.mode(), distribution.std, distribution.sample()


CALLS = {
    "kl_loss": lambda m: vaekl.kl_loss(*m.chunk(2, 1)),
    "rows": lambda m: vaekl.kl_loss(*m.chunk(2, 1), reduction="none", clamp=(-0.5, None)),
    "kl_of_mean": lambda m: vaekl.kl_of_mean(*m.chunk(2, 1), mean_over="all"),
    "sample": lambda m: vaekl.reparameterize_kl(*m.chunk(2, 1), reduction="mean"),
    "seed": lambda m: vaekl.reparameterize(*m.chunk(2, 1), seed=-5),
    "moments": lambda m: vaekl.reparameterize_kl_moments(m, seed=2**63 + 3),
    "posterior": posterior,
}


@pytest.fixture
def onnx(monkeypatch):
    """torch's exporter looks into the finished file for functions of onnxscript; there are none."""
    if importlib.util.find_spec("onnx") is None:
        found = types.ModuleType("onnx")
        empty = types.SimpleNamespace(graph=types.SimpleNamespace(node=[]))
        found.load_model_from_string = lambda content: empty
        monkeypatch.setitem(sys.modules, "onnx", found)


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exported_by_tracing(call, dtype, onnx, device):
    """Of ONNX's own operators, and of any number of samples."""
    moments = make_inputs((3, 8), dtype=dtype, device=device)[0]
    file = io.BytesIO()
    torch.onnx.export(
        Function(CALLS[call]), (moments,), file, dynamo=False,
        input_names=["moments"], dynamic_axes={"moments": {0: "batch"}},
    )  # fmt: skip
    assert b"BitwiseAnd" in file.getvalue() or call not in ("seed", "moments")
    assert b"vaekl" not in file.getvalue().replace(b"/vaekl/", b"")


@pytest.mark.parametrize("samples", [True, False])
def test_a_module_is_exported(samples, onnx, device):
    module, file = vaekl.nn.ReparameterizeKL(sample_in_eval=samples), io.BytesIO()
    inputs = make_inputs((3, 8), device=device)
    torch.onnx.export(module.eval(), inputs, file, dynamo=False)
    assert (b"RandomNormal" in file.getvalue()) is samples


@pytest.mark.parametrize("seed", [0, -5, 2**64 - 1])
@pytest.mark.parametrize("shape", [(3, 7), (70, 1030)])
def test_traced_noise_is_that_of_the_seed(seed, shape):
    """To the bit, by arithmetic that ONNX has."""
    zeros = torch.zeros(shape, dtype=torch.float64)
    draw = lambda zeros: vaekl.reparameterize(zeros, zeros, seed=seed, backend="eager")  # noqa: E731
    small = zeros[:2, :5]
    traced = torch.jit.trace(draw, (small,), check_trace=False)
    assert torch.equal(traced(zeros), draw(zeros))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 20.0])
def test_traced_kl(scale, dtype, device):
    """As exact as the kernels' near collapse, and where the series ends."""
    moments = make_inputs((5, 16), dtype=dtype, device=device, scale=scale)[0]
    moments[0, 8:12] = torch.tensor([1.0, -1.0, 1.0 + 1e-6, -1.0 - 1e-6])
    call = lambda m: vaekl.reparameterize_kl_moments(m, seed=1, reduction="none")  # noqa: E731
    traced = torch.jit.trace(call, (moments[:2],), check_trace=False)
    oracle = moments_oracle(moments, reduction="none")
    for kl in (traced(moments)[1], call(moments).kl):
        assert worst(kl, oracle.kl, KL_BUDGET[dtype] * oracle.kl) <= 1
