"""What is drawn in tests depends on no order: the hooks of conftest.py."""

import random
import zlib

import numpy as np
import pytest
import torch


def draw():
    return random.random(), np.random.random_sample(), torch.rand(()).item()


def drawn(name):
    """What the first draw after conftest's seed of this name gives."""
    number = zlib.crc32(name.encode())
    generator = torch.Generator().manual_seed(number)
    return (
        random.Random(number).random(),
        np.random.RandomState(number).random_sample(),
        torch.rand((), generator=generator).item(),
    )


AT_IMPORT = draw()


@pytest.fixture(scope="module")
def of_the_module():
    return draw()


@pytest.fixture(params=["a", "b"])
def of_the_test(request):
    draw()
    return draw()


@pytest.fixture
def after_another(of_the_test):
    return draw()


@pytest.mark.parametrize("case", [1, 2])
def test_each_draws_from_a_seed_of_its_own(case, of_the_module, after_another, request):
    assert draw() == drawn(request.node.nodeid)
    assert draw() != drawn(request.node.nodeid)
    assert AT_IMPORT == drawn(request.node.parent.nodeid)
    assert of_the_module == drawn(f"{request.node.parent.nodeid} of_the_module")
    assert after_another == drawn(f"{request.node.nodeid} after_another")
