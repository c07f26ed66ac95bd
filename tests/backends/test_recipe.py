"""CONTRIBUTING's recipe for a backend: one file and one line, and it is right everywhere."""

import re
import types

import pytest
import torch

import vaekl
from paths import ROOT
from vaekl import _check, _plans, backends
from vaekl.testing import make_inputs, step


@pytest.fixture
def toy(monkeypatch):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    recipe = text[text.index("## Adding a backend") : text.index("## Adding a peer")]
    (code,) = re.findall(r"```python\n(.*?)```", recipe, re.DOTALL)
    module = types.ModuleType("vaekl.backends.toy")
    exec(compile(code, "CONTRIBUTING.md", "exec"), vars(module))
    monkeypatch.setitem(backends.registry, "toy", backends.Entry(lambda: module))
    _plans.forget()
    yield module
    backends.forget()


@pytest.mark.parametrize("case", _check.CASES, ids=str)
def test_every_case_of_vaekl_check_passes(case, toy):
    assert _check.check_case(case, "toy", "cpu").problem is None


def test_all_roads_take_it(toy, storage):
    tensors = storage.store(*make_inputs((4, 2, 3)))
    call = lambda *t: storage.call(*t, seed=5, backend="toy")  # noqa: E731
    direct = step(call, tensors)
    program = torch.compile(call, backend="aot_eager", fullgraph=True)
    for a, b in zip(direct.tensors, step(program, tensors).tensors, strict=True):
        torch.testing.assert_close(b, a)
    expected = step(lambda *t: storage.call(*t, seed=5, backend="eager"), tensors)
    for a, b in zip(direct.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(a, b)
    mu, logvar = make_inputs((4, 6))
    of_func = torch.func.grad(lambda m: vaekl.kl_loss(m, logvar, backend="toy"))(mu)
    torch.testing.assert_close(of_func, mu / 4)


@pytest.mark.parametrize("prior", [None, (0.5, 0.3)])
@pytest.mark.parametrize("path", [False, True])
def test_log_densities(prior, path, toy):
    tensors, ids = make_inputs((4, 6)), torch.tensor([7, 0, 2, 1])
    options = {"prior": prior, "path_derivative": path, "seed": 5, "sample_ids": ids}
    toys, expected = (
        step(lambda *t, b=b: vaekl.reparameterize_log_prob(*t, backend=b, **options), tensors)
        for b in ("toy", "eager")
    )
    for a, b in zip(toys.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(a, b)


def test_where_it_cannot_run_it_says_why(toy):
    toy.why_not = lambda device: "needs a toy box"
    with pytest.raises(ModuleNotFoundError, match="backend='toy' needs a toy box"):
        vaekl.kl_loss(*make_inputs((4, 6)), backend="toy")


def test_what_it_loses_is_found(toy):
    """Noise of another sample: the check is of the backend, not of the eager one below it."""
    right = toy.noise
    toy.noise = lambda *arguments: right(*arguments).flip(0)
    problem = _check.check_case(_check.CASES[0], "toy", "cpu").problem
    assert "z by" in problem
