"""torch.export and AOTInductor: programs of plain torch operators, which run without vaekl."""

import subprocess
import sys

import pytest
import torch
from torch.export import Dim, export

import vaekl
from vaekl.testing import make_inputs

BATCH = Dim("batch", min=1)
QUIET = "ignore:`isinstance.treespec, LeafSpec:FutureWarning"  # torch's own, when it saves


class Loss(torch.nn.Module):
    """Everything, from given noise."""

    def __init__(self, backend="auto", **options):
        super().__init__()
        self.inner = vaekl.nn.ReparameterizeKL(backend=backend, **options)

    def forward(self, mu, logvar, eps):
        return tuple(self.inner(mu, logvar, eps=eps))


class Draw(torch.nn.Module):
    """z and kl of drawn noise."""

    def __init__(self, backend="auto", **noise):
        super().__init__()
        self.noise = noise
        self.backend = backend

    def forward(self, mu, logvar):
        return tuple(vaekl.reparameterize_kl(mu, logvar, backend=self.backend, **self.noise)[:2])


def inputs_of(batch, device, count=3):
    return [make_inputs((batch, 6), device=device, seed=s)[0] for s in range(count)]


def exported(module, count, device, strict=False):
    inputs = tuple(inputs_of(4, device, count))
    return export(module, inputs, dynamic_shapes=({0: BATCH},) * count, strict=strict)


def close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        torch.testing.assert_close(a, b, rtol=5e-6, atol=1e-6)


OPTIONS = {"reduction": "none", "mean_over": "all", "clamp": (-0.5, None)}


@pytest.mark.parametrize(("options", "strict"), [({}, False), (OPTIONS, False), (OPTIONS, True)])
def test_any_batch(options, strict, backend, device):
    module = Loss(backend, **options)
    program = exported(module, 3, device, strict)
    for batch in (4, 1, 9):
        inputs = inputs_of(batch, device)
        close(program.module()(*inputs), module(*inputs))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("noise", [{"seed": 3}, {}])
def test_any_event(noise, strict, backend, device):
    """Sizes that are no whole groups of noise, and fewer than one."""
    axes = {0: BATCH, 1: Dim("event", min=2)}
    inputs = tuple(make_inputs((4, 6), device=device))
    module = Draw(backend, **noise)
    program = export(module, inputs, dynamic_shapes=(axes, axes), strict=strict).module()
    for shape in ((4, 6), (3, 2), (1, 9), (5, 8)):
        inputs = make_inputs(shape, device=device)
        z, kl = program(*inputs)
        assert z.shape == shape
        close([kl], [module(*inputs)[1]])
        if noise:
            close([z], [module(*inputs)[0]])


def test_no_operator_of_vaekl_is_left(backend, device):
    """Nor anything else that is not torch's own: a runtime without Python can run it."""
    for program in (exported(Loss(backend), 3, device), exported(Draw(backend), 2, device)):
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        names = {getattr(node.target, "namespace", "builtin") for node in calls}
        assert names <= {"aten", "builtin"}, names


def test_near_collapse(device):
    """The exported KL has the digits of the kernels', not those of the plain formula."""
    program = exported(Loss(reduction="none"), 3, device)
    mu, logvar, eps = (1e-4 * t for t in inputs_of(4, device))
    wide = vaekl.kl_loss(mu.double(), logvar.double(), reduction="none")
    kl = program.module()(mu, logvar, eps)[1]
    torch.testing.assert_close(kl.double(), wide, rtol=5e-7, atol=0)


def test_a_program_can_be_trained(backend, device):
    program = exported(Loss(backend), 3, device).module()
    found = []
    for function in (program, Loss(backend)):
        leaves = [t.requires_grad_() for t in inputs_of(5, device)]
        z, kl, kl_of_mean = function(*leaves)
        loss = z.sin().sum() + 2 * kl + 3 * kl_of_mean
        found.append(torch.autograd.grad(loss, leaves))
    close(*found)


def test_noise_of_a_program(backend, device):
    """torch.randn's, new at each run; with seed=, that of the noise contract."""
    mu, logvar = inputs_of(4, device, 2)
    program = exported(Draw(backend), 2, device).module()
    torch.manual_seed(3)
    z, _ = program(mu, logvar)
    torch.manual_seed(3)
    eps = torch.randn(4, 6, device=device)
    close([z], [vaekl.reparameterize(mu, logvar, eps=eps)])
    assert not torch.equal(program(mu, logvar)[0], z)
    program = exported(Draw(backend, seed=7), 2, device).module()
    close(program(mu, logvar), vaekl.reparameterize_kl(mu, logvar, seed=7)[:2])


def test_a_generator_is_refused(device):
    module = Draw(generator=torch.Generator(device))
    with pytest.raises(ValueError, match="generator must be None in what is exported"):
        exported(module, 2, device)


@pytest.mark.filterwarnings(QUIET)
def test_a_saved_program_runs_without_vaekl(tmp_path, device):
    program = exported(Loss("cpu" if device == "cpu" else "auto"), 3, device)
    inputs = inputs_of(5, device)
    torch.export.save(program, tmp_path / "loss.pt2")
    torch.save([inputs, Loss()(*inputs)], tmp_path / "data.pt")
    code = """
import sys, torch
program = torch.export.load(sys.argv[1] + "/loss.pt2").module()
inputs, expected = torch.load(sys.argv[1] + "/data.pt")
for a, b in zip(program(*inputs), expected):
    torch.testing.assert_close(a, b, rtol=5e-6, atol=1e-6)
assert "vaekl" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings(QUIET)
def test_aot_inductor(tmp_path, device):
    """Compiled ahead of time, loaded again: kl, and z with eps given, for any batch."""
    program = exported(Loss(clamp=(-2.0, None)), 3, device)
    path = tmp_path / "loss.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    compiled = torch._inductor.aoti_load_package(str(path))
    for batch in (4, 9):
        inputs = inputs_of(batch, device)
        close(compiled(*inputs), Loss(clamp=(-2.0, None))(*inputs))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # checks of shapes are not traced
def test_a_torchscript_trace_is_no_constant(device):
    """torch.jit.trace sees operations, as of the plain code."""
    mu, logvar, eps = inputs_of(4, device)
    traced = torch.jit.trace(Loss(), (mu, logvar, eps), check_trace=False)
    close(traced(2 * mu, logvar, eps), Loss()(2 * mu, logvar, eps))


def test_fx_symbolic_trace_says_that_it_has_no_tensors():
    with pytest.raises(TypeError, match=r"mu must be a torch\.Tensor, got Proxy"):
        torch.fx.symbolic_trace(lambda m, v: vaekl.kl_loss(m, v))


def test_torchscript_says_that_it_cannot_read_the_source():
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only arguments"):
        torch.jit.script(vaekl.nn.ReparameterizeKL())
