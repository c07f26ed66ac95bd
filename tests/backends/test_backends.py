"""Libraries that are installed and do not work: "auto" does without, and it is said why."""

import json
import os
import subprocess
import sys

import pytest
import torch

import vaekl
from vaekl import _check, _plans, _validate, backends

#: What a user meets, as JSON: calls of all kinds with "auto", warnings, a call by name, the check.
REPORT = """
import json, sys, warnings, torch, vaekl
from vaekl import _check, _validate, backends
{setup}
x = torch.ones(4, 3, requires_grad=True)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    values = [{first}.item()]
    values += [vaekl.kl_loss(x, x).item(), vaekl.diagnose(x, x).kl]
    values += [vaekl.reparameterize_kl(torch.ones(3, 2), torch.zeros(3, 2)).kl.item()]
try:
    vaekl.kl_loss(x, x, backend="cpu")
    error = ""
except Exception as raised:
    error = f"{{type(raised).__name__}}: {{raised}}"
print(json.dumps([values, [f"{{w.category.__name__}}: {{w.message}}" for w in said], error,
    _check.where("cpu").reason, _validate.resolve_backend("auto", x.device)]))
"""
PLAIN = "vaekl.kl_loss(x, x)"
COMPILED = (
    "torch.compile(lambda x: vaekl.kl_loss(x, x), backend='aot_eager', fullgraph=True)(x).detach()"
)


def python(code, folder, **env):
    """What `code` prints as JSON, with the packages of a folder before all others."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def package(folder, name, code):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)


TOO_NEW = "raise ImportError('Numba needs NumPy 2.0 or less. Got NumPy 2.4.')\n"
OFF = "needs numba's JIT, which is off (NUMBA_DISABLE_JIT, "


@pytest.mark.parametrize(
    ("how", "why", "first"),
    [
        ("broken", "needs numba, and importing it raises ImportError: Numba needs NumPy", COMPILED),
        ("in part", "needs numba, and importing it raises ImportError: cannot import", PLAIN),
        ("module", OFF, PLAIN),
        ("file", OFF, PLAIN),
        ("environment", OFF, PLAIN),
    ],
    ids=["broken", "in part", "module", "file", "environment"],
)
def test_numba_that_does_not_work(how, why, first, tmp_path):
    setup, env = "", {}
    if how == "broken":
        package(tmp_path, "numba", TOO_NEW)
    elif how == "in part":
        package(tmp_path, "numba", "class config:\n    DISABLE_JIT = 0\n")
    elif how == "module":  # after vaekl is imported
        setup = "import numba; numba.config.DISABLE_JIT = True"
    elif how == "file":
        # numba leaves reading to PyYAML, which need not be installed here.
        package(tmp_path, "yaml", "import json\nsafe_load = json.load\n")
        (tmp_path / ".numba_config.yaml").write_text('{"disable_jit": 1}')
    else:
        env["NUMBA_DISABLE_JIT"] = "1"
    values, said, error, reason, backend = python(
        REPORT.format(setup=setup, first=first), tmp_path, **env
    )
    kl = 1.5 * torch.e - 1.5
    assert values == [*[pytest.approx(kl, rel=1e-6)] * 3, 1.0]
    assert len(said) == 1
    assert said[0].startswith("RuntimeWarning: vaekl: the slower backend 'eager' runs on cpu tens")
    assert why in said[0]
    assert error.startswith(f"ModuleNotFoundError: backend='cpu' {why}")
    assert reason.startswith(why)
    assert backend == "eager"


def test_a_program_for_a_backend_that_does_not_work_says_why(tmp_path):
    """As one compiled or exported on another machine: it has the backend's name in it."""
    code = (
        "import json, torch, vaekl\n"
        "x = torch.ones(4, 3)\n"
        "try:\n"
        "    spec = vaekl._spec.Spec(False, 'sum', None, 1, 'logvar', None, 'cpu')\n"
        "    text = vaekl._spec.to_text(spec)\n"
        "    torch.ops.vaekl.reparameterize_kl(x, [x], None, None, None, text)\n"
        "except ImportError as error:\n"
        "    print(json.dumps(str(error)))\n"
    )
    assert python(code, tmp_path, NUMBA_DISABLE_JIT="1").startswith(f"backend='cpu' {OFF}")


TRITON = """
import json, warnings, torch, vaekl
from vaekl import _check, _validate, backends
{setup}
cuda = torch.device("cuda")
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    chosen = [_validate.resolve_backend("auto", cuda) for _ in range(3)]
try:
    error = _validate.resolve_backend("triton", cuda)
except ModuleNotFoundError as raised:
    error = str(raised)
print(json.dumps([chosen, [str(w.message) for w in said], error]))
"""
#: A machine with a device, as far as torch is concerned: Triton looks for its driver.
DEVICE = "torch.cuda.is_initialized = lambda: True\n"
#: A driver that compiles C, by Triton's own code, when it is made.
COMPILES = """
import triton
from triton.backends import Backend, backends
from triton.backends.driver import DriverBase
from triton.runtime.build import compile_module_from_src

class Driver(DriverBase):
    def __init__(self):
        compile_module_from_src("int a;", "a_module")

    @staticmethod
    def is_active():
        return True

for abstract in Driver.__abstractmethods__:
    if abstract != "is_active":
        setattr(Driver, abstract, lambda *_: None)
Driver.__abstractmethods__ = frozenset()
backends.clear()
backends["one"] = Backend(compiler=None, driver=Driver)
"""


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("broken", "needs triton, and importing it raises OSError: libtriton.so: cannot open"),
        ("no driver", "needs triton with a driver and a C compiler, and its start raises Runtime"),
        ("no compiler", "needs triton with a driver and a C compiler, and its start raises FileNo"),
    ],
    ids=["broken", "no driver", "no compiler"],
)
def test_triton_that_does_not_work(how, why, tmp_path):
    setup, env = DEVICE, {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    if how == "broken":
        package(tmp_path, "triton", "raise OSError('libtriton.so: cannot open\\nmore')\n")
    else:
        pytest.importorskip("triton")
    if how == "no compiler":
        setup += COMPILES
        env.update(CC=str(tmp_path / "cc"), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    chosen, said, error = python(TRITON.format(setup=setup), tmp_path, **env)
    assert chosen == ["eager"] * 3
    assert len(said) == 1
    assert said[0].startswith("vaekl: the slower backend 'eager' runs on cuda tensors, because ")
    assert f"backend='triton' {why}" in said[0]
    assert error.startswith(f"backend='triton' {why}")


@pytest.fixture
def found_out_anew():
    backends.forget()
    yield
    backends.forget()


@pytest.mark.parametrize("library", ["numba", "triton"])
def test_what_is_not_installed_is_not_missed(library, monkeypatch, found_out_anew):
    """ "auto" does without, and says nothing: it was not asked for."""
    monkeypatch.setitem(sys.modules, library, None)
    device = torch.device("cpu" if library == "numba" else "cuda")
    backend = "cpu" if library == "numba" else "triton"
    assert _validate.resolve_backend("auto", device) == "eager"
    with pytest.raises(ModuleNotFoundError, match=f"backend='{backend}' needs {library}: pip inst"):
        _validate.resolve_backend(backend, device)
    assert _check.where(backend).reason.startswith(f"needs {library}: pip install")


def test_tensors_without_a_device_start_no_driver(monkeypatch, found_out_anew):
    """Fake tensors on CUDA, to compile for a machine that has it."""
    pytest.importorskip("triton")
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is in use in this process")
    launcher = pytest.importorskip("vaekl.backends.triton")
    monkeypatch.setattr(launcher, "why_not", lambda device: pytest.fail("started"))
    assert _validate.resolve_backend("auto", torch.device("cuda")) == "triton"
    assert _validate.resolve_backend("triton", torch.device("cuda")) == "triton"


def test_a_first_call_that_is_compiled(found_out_anew, device):
    x = torch.ones(4, 3, device=device)
    expected = vaekl.kl_loss(x, x)
    for backend in ("auto", "cpu" if device == "cpu" else "triton"):
        backends.forget()
        _plans.forget()
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x, backend=backend: vaekl.kl_loss(x, x, backend=backend),
            backend="aot_eager", fullgraph=True,
        )  # fmt: skip
        for _ in range(2):
            assert torch.equal(compiled(x), expected)
