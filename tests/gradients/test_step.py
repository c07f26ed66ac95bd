"""vaekl.testing.step, by which other tests go forward and back."""

import pytest
import torch

from vaekl.testing import make_inputs, random_upstream, step


def three(x, y):
    """Two outputs that need gradients, one that does not, and none."""
    return x * y, None, (x + 2 * y).sum(), y.detach()


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_gradients_are_autograds(needs, device):
    x, y = make_inputs((3, 4), device=device)
    outputs, upstream, gradients = found = step(three, (x, y), needs=needs)
    g, nothing, h, constant = upstream
    assert nothing is constant is None
    assert torch.equal(outputs[0], x * y)
    exact = [g * y + h, g * x + 2 * h]
    assert [gradient is not None for gradient in gradients] == list(needs)
    wanted = [gradient for gradient, need in zip(exact, needs) if need]
    for a, b in zip(found.tensors, [x * y, (x + 2 * y).sum(), y, *wanted], strict=True):
        torch.testing.assert_close(a, b)
    assert not x.requires_grad
    assert not y.requires_grad


def test_upstream_may_be_given(device):
    x, y = make_inputs((3, 4), device=device)
    g = torch.full_like(x, 0.5)
    gradients = step(three, (x, y), (g, None, None, None)).gradients
    for a, b in zip(gradients, (g * y, g * x)):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="zip"):
        step(three, (x, y), (g,))


def test_one_tensor_and_inputs_that_are_none(device):
    x, _ = make_inputs((3, 4), device=device)
    found = step(lambda a, b: a * 2, (x, None))
    assert found.gradients[1] is None
    assert torch.equal(found.gradients[0], 2 * found.upstream[0])


def test_upstream_depends_on_shapes_alone(device):
    """Random, of either sign, and no global generator is touched."""
    before = torch.get_rng_state()
    outputs = [torch.zeros(3, 4, device=device), None, torch.zeros((), device=device)]
    first, again = random_upstream(outputs), random_upstream(outputs)
    wide = random_upstream([None if o is None else o.double() for o in outputs])
    for a, b, c in zip(first, again, wide):
        assert (a is None) is (c is None)
        assert a is b is None or torch.equal(a, b)
        assert a is None or torch.equal(a, c.float())
    assert len(torch.cat([first[0].flatten(), first[2][None]]).unique()) == 13
    assert (first[0] < 0).any()
    assert torch.equal(torch.get_rng_state(), before)
