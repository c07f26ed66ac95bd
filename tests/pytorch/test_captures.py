"""Every way in which torch records or intercepts a call: what it holds computes what the call does.

A call that none of them could see would leave a program of unwritten memory, or of constants.
"""

import pytest
import torch
from torch._functorch.aot_autograd import aot_function
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vaekl
from modules import Function
from vaekl.testing import make_inputs, step


def _make_fx(mode, pre_dispatch):
    return lambda f, *t: make_fx(f, tracing_mode=mode, pre_dispatch=pre_dispatch)(*t)


def _export(strict):
    return lambda f, *t: torch.export.export(Function(f), t, strict=strict).module()


def _functionalized(f, *t):
    return make_fx(torch.func.functionalize(f))(*t)


def _first_program(f, *tensors):
    """The one that torch.compile hands to its backend."""
    programs = []

    def keep(program, _):
        programs.append(program)
        return program.forward

    torch.compile(f, backend=keep, fullgraph=True)(*tensors)
    return lambda *t: tuple(programs[0](*t))


#: (function, tensors) -> what was captured, to be called with others.
CAPTURES = {
    **{
        f"make_fx {mode}{' pre_dispatch' if pre else ''}": _make_fx(mode, pre)
        for mode in ("real", "fake", "symbolic")
        for pre in (False, True)
    },
    "functionalize": _functionalized,
    "export": _export(False),
    "export strict": _export(True),
    "compile": _first_program,
    "aot": lambda f, *t: aot_function(f, fw_compiler=lambda program, _: program),
    "jit.trace": lambda f, *t: torch.jit.trace(f, t, check_trace=False),
}


def _gradients(m, v, e, **options):
    call = lambda m, v: vaekl.reparameterize_kl(m, v, eps=e, kl_of_mean=False, **options)  # noqa: E731
    return step(call, (m, v), (e, torch.ones(()).to(e), None)).gradients


#: (mu, logvar, eps) -> results.
CALLS = {
    "pair": lambda m, v, e, **o: tuple(vaekl.reparameterize_kl(m, v, eps=e, **o)),
    "moments": lambda m, v, e, **o: tuple(
        vaekl.reparameterize_kl_moments(torch.cat([m, v], 1), eps=e, clamp=(-1, 1), **o)
    ),
    "seed": lambda m, v, e, **o: (vaekl.reparameterize(m, v, seed=5, **o), e + 1),
    "gradients": _gradients,
}
PAIRS = [
    (capture, call)
    for capture in CAPTURES
    for call in CALLS
    if call != "gradients" or "make_fx" in capture  # the others have backward programs of their own
]
#: torch's own warnings of what is deprecated or unlike a trace.
quiet = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)


def fill_freed_memory():
    """What an unwritten result might otherwise hold by luck."""
    torch.full((64, 64), 7.7)


@quiet
@pytest.mark.parametrize(("capture", "call"), PAIRS)
def test_a_captured_program_computes_what_the_call_does(capture, call, backend, device):
    function = lambda *t: CALLS[call](*t, backend=backend)  # noqa: E731
    first, second = (
        (*make_inputs((4, 6), device=device, seed=s), make_inputs((4, 6), device=device, seed=9)[1])
        for s in (1, 2)
    )
    program = CAPTURES[capture](function, *first)
    for tensors in (first, second):
        fill_freed_memory()
        found = program(*tensors)
        for a, b in zip(found, function(*tensors), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@quiet
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("transform", ["none", "grad", "jvp", "functionalize"])
def test_a_captured_transform_draws_anew(transform, mode, backend, device):
    """No key that the host could read is there yet, nor should the program hold one."""
    logvar = make_inputs((4, 6), device=device)[1]
    sample = lambda v: vaekl.reparameterize(0 * v, v, backend=backend)  # noqa: E731
    function = {
        "none": sample,
        "grad": torch.func.grad(lambda v: sample(v).sum()),
        "jvp": lambda v: torch.func.jvp(sample, (v,), (v,))[1],
        "functionalize": torch.func.functionalize(sample),
    }[transform]
    program = make_fx(function, tracing_mode=mode)(logvar)
    first, second = program(logvar), program(logvar)
    assert not torch.equal(first, second)
    assert first.isfinite().all()


@quiet
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_captured_program_draws_anew(pre_dispatch, backend, device):
    mu, logvar = make_inputs((4, 6), device=device)
    function = lambda m, v: vaekl.reparameterize(m, v, backend=backend)  # noqa: E731
    program = make_fx(function, pre_dispatch=pre_dispatch)(mu, logvar)
    first, second = program(mu, logvar), program(mu, logvar)
    assert not torch.equal(first, second)
    assert first.isfinite().all()


def test_captures_inside_of_each_other(backend, device):
    """A transform inside of a capture, and fake tensors inside of a pre-dispatch one."""
    mu, logvar = make_inputs((4, 6), device=device)
    function = lambda m, v: vaekl.kl_loss(m, v, backend=backend)  # noqa: E731
    program = make_fx(torch.func.vmap(function))(mu[None], logvar[None])
    torch.testing.assert_close(program(mu[None], logvar[None])[0], function(mu, logvar))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (mu, logvar)]
        program = make_fx(function, pre_dispatch=True)(*fakes)
    torch.testing.assert_close(program(mu, logvar), function(mu, logvar))


class _SeesFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_function_mode_sees_the_call(backend, device):
    mu, logvar = make_inputs((4, 6), device=device)
    with _SeesFunctions() as mode:
        kl = vaekl.kl_loss(mu, logvar, backend=backend)
    assert any("reparameterize_kl" in name for name in mode.names)
    assert torch.equal(kl, vaekl.kl_loss(mu, logvar, backend=backend))


class _Doubles(TorchDispatchMode):
    """Changes what an operator gives: results must come from it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if "vaekl" not in str(function):
            return results
        return tuple(2 * r if r.is_floating_point() else r for r in results)


def test_a_dispatch_mode_has_the_last_word(backend, device):
    mu, logvar = make_inputs((4, 6), device=device)
    with _Doubles():
        kl = vaekl.kl_loss(mu, logvar, backend=backend)
    assert torch.equal(kl, 2 * vaekl.kl_loss(mu, logvar, backend=backend))


@pytest.mark.parametrize("generator", [False, True])
def test_compile_takes_the_operator_and_its_noise(generator, backend, device):
    """Also where is_exporting() is True inside of torch.compile (torch 2.10 and 2.11)."""
    mu, logvar = make_inputs((2, 4), device=device)
    given = {"generator": torch.Generator(device).manual_seed(1)} if generator else {}
    function = lambda m, v: vaekl.reparameterize(m, v, backend=backend, **given)  # noqa: E731
    torch.manual_seed(1)
    expected = function(mu, logvar)
    if generator:
        given["generator"].manual_seed(1)
    torch.manual_seed(1)
    compiled = torch.compile(function, backend="eager", fullgraph=not generator)
    assert torch.equal(compiled(mu, logvar), expected)
