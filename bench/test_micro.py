"""Microbenchmarks: ``python -m pytest bench --benchmark-only`` (``make bench``)."""

import pytest
import timing
import torch
from cases import MODES, Case
from correctness import fault
from providers import PROVIDERS, Step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((128, 20), (1024, 32), (12, 4, 32, 32))

# Inductor's, of code in torch itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@pytest.fixture(scope="module", params=PROVIDERS, ids=lambda provider: provider.name)
def provider(request):
    reason = request.param.missing(DEVICE)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module", params=(True, False), ids=("both_kls", "one_kl"))
def step(request, provider, case):
    """A step whose results were found right."""
    if not provider.takes(case.shape):
        pytest.skip(f"{provider.name} takes {provider.axes} axes")
    function, inputs = provider.build(), case.inputs(DEVICE)
    problem = fault(Step(provider, function, *inputs, request.param, dkl=float(case.shape[0])))
    assert problem is None, problem
    return Step(provider, function, *inputs, request.param)


@pytest.mark.benchmark(max_time=0.2, warmup=True, warmup_iterations=3)
@pytest.mark.parametrize("mode", MODES)
def test_step(benchmark, step, case, mode):
    benchmark.group = f"{case.name} {mode} {'both KLs' if step.both else 'one KL'}"
    call = step.forward if mode == "forward" else step.forward_backward

    def call_and_wait():
        call()
        timing.wait(DEVICE)

    benchmark(call_and_wait)
