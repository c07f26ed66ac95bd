"""Modules reloaded, as by IPython's autoreload; vaekl dropped and imported anew."""

import os
import subprocess
import sys

import torch

from vaekl import _registry

SCRIPT = """
import gc, importlib, os, signal, sys, types, weakref
import torch, vaekl, vaekl.__main__
from torch._subclasses import FakeTensorMode
from vaekl import testing
from vaekl.backends import cpu
from vaekl.backends import triton as launcher

x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
torch.set_num_threads(2)


def results(vaekl, backend, call=lambda function, *tensors: function(*tensors)):
    "Outputs and gradients of both operators."
    found = []
    options = dict(seed=1, backend=backend)
    for function, *tensors in (
        (lambda x: vaekl.reparameterize_kl(x, 2 * x, **options), x),
        (lambda x: vaekl.reparameterize_kl_moments(x, **options), x),
    ):
        outputs = call(function, *tensors)
        found += [t.detach() for t in outputs]
        found += torch.autograd.grad([outputs[0].sum(), *outputs[1:]], tensors)
    return found + [vaekl.diagnose(x, x, backend=backend).kl_dims]


def compiled(function, *tensors):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)


def check(vaekl, *backends, call=None):
    for backend in backends:
        found = results(vaekl, backend, *([call] if call else []))
        assert all(map(torch.equal, found, first[backend])), backend
    with FakeTensorMode():  # by the operators' fakes
        assert vaekl.reparameterize_kl(torch.ones(3, 6), torch.ones(3, 6))[0].shape == (3, 6)


def modules():
    return sorted(n for n in sys.modules if n == "vaekl" or n.startswith("vaekl."))


BACKENDS = ("eager", "cpu", "triton")
first = {backend: results(vaekl, backend) for backend in BACKENDS}
program = torch.compile(vaekl.kl_loss, fullgraph=True, backend="aot_eager")
of_program = program(x, x)
large = torch.zeros(512, 512)
vaekl.kl_loss(large, large, backend="cpu")  # threads are there

# diffusers, as far as the patch looks at it.
home = types.ModuleType("diffusers.models.autoencoders.vae")
kinds = [type("DiagonalGaussianDistribution", (), {})]  # no names, which would be patched too
home.DiagonalGaussianDistribution = kinds[0]
for name in ("diffusers", "diffusers.models", "diffusers.models.autoencoders"):
    sys.modules[name] = types.ModuleType(name)
sys.modules[home.__name__] = home
patch = vaekl.patch_diffusers()
kinds.append(home.DiagonalGaussianDistribution)

for name in modules():
    importlib.reload(sys.modules[name])
    check(vaekl, "eager", "cpu")
check(vaekl, *BACKENDS)
check(vaekl, "cpu", call=compiled)
assert torch.equal(program(x, x), of_program)
assert home.DiagonalGaussianDistribution is kinds[1]
newer = vaekl.patch_diffusers()
assert home.DiagonalGaussianDistribution not in kinds
patch.undo()
assert home.DiagonalGaussianDistribution not in kinds
newer.undo()
assert home.DiagonalGaussianDistribution is kinds[0]
with vaekl.patch_diffusers():
    importlib.reload(vaekl.distributions)
assert home.DiagonalGaussianDistribution is kinds[0]
print("reloaded")

old = vaekl
gone = []
for _ in range(3):
    gone.append(weakref.ref(sys.modules["vaekl.nn"]))
    for name in modules():
        del sys.modules[name]
    del vaekl
    import vaekl
    assert vaekl is not old
    check(vaekl, "eager")
check(vaekl, *BACKENDS)
check(vaekl, "cpu", call=compiled)
check(old, *BACKENDS)
check(old, "cpu", call=compiled)
assert torch.equal(program(x, x), of_program)
torch._dynamo.reset()
gc.collect()
assert [ref() is None for ref in gone[1:]] == [True, True], "modules that nobody has are kept"
print("imported again")

child = os.fork()
if child == 0:
    signal.alarm(60)  # a child whose parent's threads it waits for
    importlib.reload(vaekl.backends.threads)
    vaekl.kl_loss(large, large, backend="cpu")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("forked")
"""


def test_reloaded_and_imported_again(tmp_path):
    """The same numbers by every road; what is older goes on working, and is not kept for ever."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:.*fork:DeprecationWarning",
         "-W", "ignore:Conversion of an array:DeprecationWarning", "-c", SCRIPT],
        capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.stdout.split("\n")[:-1] == ["reloaded", "imported again", "forked"], done.stderr


def test_an_operator_that_looks_different_is_defined_anew():
    """As after an upgrade in place. Its gradients are what they were, until they are given anew."""
    name, x = "only_of_a_test", torch.ones(2, requires_grad=True)
    call = lambda: getattr(torch.ops.vaekl, name)(x)  # noqa: E731
    fake = lambda x: torch.empty_like(x)  # noqa: E731
    try:
        _registry.define(name, "(Tensor x) -> Tensor", (), lambda x: 2 * x, fake)
        _registry.differentiate(name, lambda ctx, dy: 2 * dy, lambda ctx, inputs, output: None)
        assert call().sum().item() == 4
        library = _registry._operators[name]["library"]
        _registry.define(name, "(Tensor x) -> Tensor", (), lambda x: 3 * x, fake)
        assert _registry._operators[name]["library"] is library
        assert call().sum().item() == 6
        _registry.define(name, "(Tensor x, int n=5) -> Tensor", (), lambda x, n=5: n * x, fake)
        assert call().sum().item() == 10
        assert torch.autograd.grad(call().sum(), x)[0].tolist() == [2, 2]
        _registry.differentiate(
            name, lambda ctx, dy: (5 * dy, None), lambda ctx, inputs, output: None
        )
        assert torch.autograd.grad(call().sum(), x)[0].tolist() == [5, 5]
    finally:
        _registry._operators.pop(name)["library"]._destroy()
