"""What torch.onnx.export gives, run by onnxruntime: the numbers of the calls themselves."""

import io

import pytest
import torch

import vaekl
from modules import Function
from vaekl.testing import make_inputs

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:Exporting a model while:UserWarning"),
]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _installed():
    pytest.importorskip("onnxruntime", reason="not compared: onnxruntime (not installed)")


def run(function, example, inputs, dynamo=False, axes=None):
    """Results of the exported function."""
    import onnxruntime

    model, file = Function(function).eval(), io.BytesIO()
    if dynamo:
        shapes = (tuple({0: torch.export.Dim.DYNAMIC} for _ in example),)
        program = torch.onnx.export(
            model, tuple(example), dynamo=True, dynamic_shapes=shapes, verbose=False
        )
        program.save(file)
    else:
        names = [f"input_{i}" for i in range(len(example))]
        moving = {name: {0: "batch", **(axes or {})} for name in names}
        torch.onnx.export(
            model, tuple(example), file, dynamo=False, input_names=names, dynamic_axes=moving
        )
    session = onnxruntime.InferenceSession(file.getvalue())
    given = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, given)]


def tuple_of(results):
    return results if isinstance(results, tuple) else (results,)


def close(actual, expected, rtol):
    for a, b in zip(actual, tuple_of(expected), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=rtol, atol=0)


KLS = {
    "sum": lambda m, v: vaekl.kl_loss(m, v, reduction="sum"),
    "batchmean": lambda m, v: vaekl.kl_loss(m, v),
    "mean": lambda m, v: vaekl.kl_loss(m, v, reduction="mean"),
    "none": lambda m, v: vaekl.kl_loss(m, v, reduction="none"),
    "batch_dims": lambda m, v: vaekl.kl_loss(
        m.reshape(-1, 2, 3), v.reshape(-1, 2, 3), reduction="none", batch_dims=2
    ),
    "clamp": lambda m, v: vaekl.kl_loss(m, v, clamp=(-0.5, 0.25)),
    "over batch": lambda m, v: vaekl.kl_of_mean(m, v),
    "over all": lambda m, v: vaekl.kl_of_mean(m, v, mean_over="all"),
    "moments": lambda m, v: vaekl.reparameterize_kl_moments(torch.cat([m, v], 1))[1:],
}


@pytest.mark.parametrize("call", list(KLS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_kls(call, dtype):
    """The exporter gives scalars of float64 no more than float32, if it is not kept from it."""
    rtol = 5e-7 if dtype is torch.float32 else 1e-14
    for scale in (1e-4, 1.0, 8.0):
        example = make_inputs((2, 6), dtype=dtype)
        inputs = make_inputs((9, 6), dtype=dtype, scale=scale, seed=1)
        close(run(KLS[call], example, inputs), KLS[call](*inputs), rtol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dynamo", [False, True])
def test_noise_of_a_seed(dtype, dynamo):
    """The exporter of dynamo=True rounds constants to float32."""
    function = lambda m, v: vaekl.reparameterize(m, v, seed=-5)  # noqa: E731
    example = make_inputs((2, 6), dtype=dtype)
    inputs = [torch.zeros(500, 6, dtype=dtype)] * 2
    (z,) = run(function, example, inputs, dynamo)
    assert z.dtype == dtype
    expected = function(*inputs)
    limit = 1e-6 if dynamo or dtype is torch.float32 else 1e-12
    torch.testing.assert_close(z, expected, rtol=limit, atol=limit)


def test_noise_of_any_event():
    """A size that was even is odd now."""
    function = lambda m, v: vaekl.reparameterize(m, v, seed=3)  # noqa: E731
    inputs = [torch.zeros(4, 7)] * 2
    (z,) = run(function, make_inputs((2, 8)), inputs, axes={1: "event"})
    torch.testing.assert_close(z, function(*inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dynamo", [False, True])
def test_noise_is_drawn(dynamo):
    function = lambda m, v: tuple(vaekl.reparameterize_kl(m, v))  # noqa: E731
    inputs = [torch.zeros(4000, 6)] * 2
    z, kl, of_mean = run(function, make_inputs((2, 6)), inputs, dynamo)
    assert abs(z.mean()) < 4 / z.numel() ** 0.5
    assert abs(z.std() - 1) < 4 / (2 * z.numel()) ** 0.5
    assert kl == of_mean == 0


def test_by_export():
    """dynamo=True, which goes through torch.export."""
    function = lambda m, v: tuple(vaekl.reparameterize_kl(m, v))[1:]  # noqa: E731
    for scale in (1e-4, 1.0):
        inputs = make_inputs((9, 6), scale=scale, seed=1)
        close(run(function, make_inputs((2, 6)), inputs, dynamo=True), function(*inputs), 5e-7)


@pytest.mark.parametrize("samples", [True, False])
def test_a_module(samples):
    import onnxruntime

    module, file = vaekl.nn.ReparameterizeKL(sample_in_eval=samples).eval(), io.BytesIO()
    inputs = make_inputs((9, 6))
    torch.onnx.export(module, inputs, file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    given = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    z, kl, of_mean = map(torch.from_numpy, session.run(None, given))
    close([kl, of_mean], module(*inputs)[1:], 5e-7)
    assert torch.equal(z, inputs[0]) is not samples
