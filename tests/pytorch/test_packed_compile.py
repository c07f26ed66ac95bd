"""Packed moments on the operator's road: seeds of 64 bits, generators."""

import pytest
import torch
from torch._dynamo.exc import Unsupported

import vaekl
from vaekl.testing import make_inputs


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1, -(2**63)])
def test_seeds_of_64_bits(seed, backend, device):
    moments = make_inputs((4, 6), device=device)[0]
    call = lambda m: vaekl.reparameterize_kl_moments(m, seed=seed, backend=backend).z  # noqa: E731
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert torch.equal(compiled(moments), call(moments))


def test_a_generator_is_refused_in_one_graph(backend, device):
    moments, generator = make_inputs((4, 6), device=device)[0], torch.Generator(device)

    @torch.compile(backend="eager", fullgraph=True)
    def call(moments):
        return vaekl.reparameterize_kl_moments(moments, generator=generator, backend=backend).z

    with pytest.raises(Unsupported, match="generator= cannot be compiled"):
        call(moments)
