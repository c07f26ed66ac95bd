"""Shared fixtures. Without a GPU the Triton kernels run under its interpreter, on CPU tensors."""

import os
import random
import sys
import zlib

import numpy as np
import torch

# Deterministic mode refuses cuBLAS without this, which is read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Inductor would start a pool of processes beside those that run the tests.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# VAEKL_PTX=sm_90: the Triton kernels are compiled for that GPU, and what they become is executed;
# with VAEKL_PTX_ERRORS=1 approximate instructions are off by as much as they may be.
PTX = os.environ.get("VAEKL_PTX")
if DEVICE == "cpu" and PTX is None:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from storages import PACKED, PAIR
from vaekl import _plans, _validate, backends
from vaekl.backends import layout as geometry
from vaekl.backends.workspace import workspaces
from vaekl.testing import CONFIGS

if PTX is not None:
    from ptx import floats, launcher

    launcher.use(PTX)
    _validate._interpreting = lambda: True  # CPU tensors may go to the Triton path


def _seed(name):
    """Every global generator, by the name of what is about to draw."""
    number = zlib.crc32(name.encode())
    if PTX is not None:
        launcher.turns.seed(number)
        if os.environ.get("VAEKL_PTX_ERRORS"):
            floats.approximate.errors = number
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


# No draw depends on what ran before: each module as it is imported, each fixture whichever test is
# the first to ask for it, and each test draw from seeds of their own.


def pytest_collectstart(collector):
    _seed(collector.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    _seed(f"{request.node.nodeid} {fixturedef.argname}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    _seed(item.nodeid)


def _state():
    """What a test could change for those after it."""
    others = ("PYTEST_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "KMP_")  # libraries write these
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "block choice": geometry.current_config(),
        "folder": os.getcwd(),
        "environment": {k: v for k, v in os.environ.items() if not k.startswith(others)},
    }


@pytest.fixture(autouse=True)
def _as_if_alone(request):
    """Nothing that earlier calls left is at hand, and the process is left as it was."""
    _plans.forget()
    workspaces.counters.clear()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    before = _state()
    yield
    after = _state()
    if request.node.get_closest_marker("peers") is not None:
        after["environment"] = before["environment"]  # theirs, set as they are imported
    assert after == before


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN (or the largest integer), so that unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    workspaces.scratch.clear()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(params=["triton", "cpu", "eager"])
def backend(request):
    if request.param == "cpu":
        if DEVICE != "cpu":
            pytest.skip("tensors of these tests are on a GPU")
        pytest.importorskip("numba")
    return request.param


@pytest.fixture
def auto(backend, monkeypatch):
    """A class leaves the choice of the backend to vaekl: make it each in turn."""
    resolve = _validate.resolve_backend
    monkeypatch.setattr(backends, "chosen", {})
    monkeypatch.setattr(_validate, "resolve_backend", lambda name, device: resolve(backend, device))
    return backend


@pytest.fixture(params=[PAIR, PACKED], ids=str)
def storage(request):
    return request.param


@pytest.fixture(params=list(CONFIGS))
def config(request):
    with _plans.use_config(CONFIGS[request.param]):
        yield CONFIGS[request.param]


class _Operators(TorchDispatchMode):
    """Remembers the operators that pass."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def operators():
    """A mode under which a test reads `names` of the operators that passed."""
    return _Operators()


@pytest.fixture
def many_programs():
    with _plans.use_config(CONFIGS["many"]):
        yield CONFIGS["many"]


@pytest.fixture
def launches_thrown_away(request, monkeypatch):
    """Nothing is launched by the Triton path: its interpreter copies tensors to and fro itself."""
    if "triton" in request.node.name and DEVICE == "cpu":
        from vaekl.backends import triton as launcher

        monkeypatch.setattr(launcher.Launch, "__call__", lambda *_: None)
