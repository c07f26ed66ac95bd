"""Shared fixtures. Without a GPU the Triton kernels run under its interpreter, on CPU tensors."""

import os
import warnings

import torch

# Deterministic mode refuses cuBLAS without this, which is read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from vaekl import _calls
from vaekl._workspace import workspaces
from vaekl.testing import CONFIGS


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


@pytest.fixture(params=list(CONFIGS))
def config(request):
    with _calls.use_config(CONFIGS[request.param]):
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
    with _calls.use_config(CONFIGS["many"]):
        yield CONFIGS["many"]


@pytest.fixture(scope="session")
def forward_mode():
    """Forward AD, ready: on first use torch warns of its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with torch.autograd.forward_ad.dual_level():
            torch.autograd.forward_ad.make_dual(torch.ones(()), torch.ones(()))


@pytest.fixture
def launches_thrown_away(request, monkeypatch):
    """Nothing is launched by the Triton path: its interpreter copies tensors to and fro itself."""
    if "triton" in request.node.name and DEVICE == "cpu":
        from vaekl import _launch

        monkeypatch.setattr(_launch.Launch, "__call__", lambda *_: None)
