"""What is saved is loaded again, also by those who trust no pickle."""

import inspect
import io
import json
import math
import pickle
import re

import pytest
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

import vaekl
from vaekl.distributions import DiagonalGaussianDistribution
from vaekl.testing import make_inputs

MU, LOGVAR = make_inputs((4, 6))


def written(posterior):
    posterior.mean = 2 * posterior.mean
    posterior.std.mul_(3)
    posterior.parameters.add_(1)
    return posterior


SAVED = {
    "module": (
        vaekl.nn.ReparameterizeKL(reduction="none", clamp=(None, 2)), [vaekl.nn.ReparameterizeKL],
        lambda module: module(MU, LOGVAR, seed=1),
    ),
    "inside": (
        torch.nn.ModuleList([vaekl.nn.ReparameterizeKL()]),
        [vaekl.nn.ReparameterizeKL, torch.nn.ModuleList],
        lambda modules: modules[0](MU, LOGVAR, seed=1),
    ),
    "results": (vaekl.reparameterize_kl(MU, LOGVAR, seed=1), [vaekl.ReparamKL], tuple),
    "report": (
        vaekl.diagnose(MU, LOGVAR), [vaekl.DiagnosticsReport],
        lambda report: [report.kl_dims, report.information_dims],
    ),
    "accumulator": (
        vaekl.DiagnosticsAccumulator().update(MU, LOGVAR),
        [vaekl.DiagnosticsAccumulator, vaekl.diagnostics.Statistics],
        lambda accumulator: [accumulator.update(LOGVAR, MU).report().kl_dims],
    ),
    "accumulator to a prior": (
        vaekl.DiagnosticsAccumulator(prior=(torch.ones(6), 0.5)).update(MU, LOGVAR),
        [vaekl.DiagnosticsAccumulator, vaekl.diagnostics.Statistics, vaekl.diagnostics.Gaussian],
        lambda accumulator: [accumulator.update(LOGVAR, MU).report().kl_dims],
    ),
    "posterior": (
        DiagonalGaussianDistribution(MU.clone()), [DiagonalGaussianDistribution],
        lambda p: [p.kl(), p.std, p.sample(torch.Generator().manual_seed(1))],
    ),
    "written": (
        written(DiagonalGaussianDistribution(MU.clone())), [DiagonalGaussianDistribution],
        lambda p: [p.kl(), p.std, p.sample(torch.Generator().manual_seed(1))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", list(SAVED))
def test_what_is_trusted_is_loaded(what):
    """By its class alone, and not without."""
    value, classes, used = SAVED[what]
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    names = {f"{c.__module__}.{c.__qualname__}" for c in classes}
    assert {n for n in get_unsafe_globals_in_checkpoint(file) if "vaekl" in n} <= names
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="not an allowed global"):
        torch.load(file, weights_only=True)
    file.seek(0)
    with safe_globals(classes):
        loaded = torch.load(file, weights_only=True)
    assert type(loaded) is type(value)
    for a, b in zip(used(loaded), used(value), strict=True):
        assert torch.equal(a, b)


def test_a_state_dict_is_loaded_as_ever():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), vaekl.nn.ReparameterizeKL())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))


def example(documented, **names):
    """Run the code in a docstring; its names."""
    (code,) = re.findall(r"```python\n(.*?)```", inspect.getdoc(documented), re.DOTALL)
    exec(code, names)
    return names


def test_the_example_of_the_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = example(vaekl.nn.ReparameterizeKL, torch=torch, vaekl=vaekl)["loss"]
    assert loaded.reduction == "mean"


def test_the_example_of_a_report():
    """Strict JSON of a batch that has NaN."""
    mu = MU.clone()
    mu[0, 0] = math.nan
    report = vaekl.diagnose(mu, LOGVAR)
    assert math.isnan(report.to_dict()["kl"])
    with pytest.raises(ValueError, match="not JSON compliant"):
        json.dumps(report.to_dict(), allow_nan=False)
    line = example(vaekl.DiagnosticsReport.to_dict, report=report, json=json, math=math)["line"]
    values = json.loads(line)
    assert values["kl"] is None
    assert values["nonfinite"] == 1
    assert values.keys() == report.to_dict().keys()
