"""Values and gradients beside what the packages' own functions return, same inputs and noise.

What is right is their own function in float64, on the same rounded inputs. vaekl may be no further
from it than they are in the dtype of the inputs, plus two units in the last place; a KL, never
rounded to half precision by vaekl, is within 1e-6 of it where the inputs are mean and logvar.
"""

import peer_cases
import peer_packages
import pytest
import torch

from vaekl.testing import unit

pytestmark = pytest.mark.peers
#: Whose scale is not what an encoder gives, but a function of it, rounded before the KL.
DIRECT = {"diffusers Oobleck", "scvi-tools VAE", "torchrl Dreamer", "pyro-ppl KL of two normals"}
DIRECT |= {"stable-audio-tools vae_sample", "scvi-tools learned prior"}


def run(function, leaves, eps, upstream=None):
    """Outputs and gradients of the leaves, in float64, and the upstream gradients."""
    with peer_packages.fixed_noise(eps):
        outputs = function(leaves)
    if upstream is None:
        torch.manual_seed(2)
        upstream = [torch.randn_like(o) for o in outputs]
    used = [g.to(o.dtype) for g, o in zip(upstream, outputs)]
    gradients = torch.autograd.grad(outputs, leaves, used)
    return [t.detach().double() for t in (*outputs, *gradients)], upstream


def error(values, exact):
    """Largest error relative to the largest value."""
    return ((values - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", peer_cases.CASES, ids=lambda case: case.name)
@pytest.mark.filterwarnings("default")  # theirs
def test_same_as_their_code(case, dtype):
    leaves = case.leaves(dtype)
    case.theirs(leaves)  # makes what it needs, with noise of its own
    torch.manual_seed(1)
    eps = torch.randn(case.noise).to(dtype)
    theirs, upstream = run(case.theirs, leaves, eps)
    wide = tuple(t.detach().double().requires_grad_() for t in leaves)
    exact, _ = run(case.theirs, wide, eps, upstream)
    ours, _ = run(lambda t: case.ours(t, eps), leaves, eps, upstream)
    assert [t.shape for t in ours] == [t.shape for t in theirs] == [t.shape for t in exact]
    count = len(exact) - len(leaves)
    for position, (mine, other, right) in enumerate(zip(ours, theirs, exact)):
        allowed = error(other, right)
        assert allowed < (1e-4 if dtype == torch.float32 else 0.05)  # the same quantity at all
        assert error(mine, right) <= allowed + 4 * unit(dtype), position
    if case.name not in DIRECT:
        kl = count - 1
        assert error(ours[kl], exact[kl]) < 1e-6
