"""Forms of a scale: each place has all of them, and a gradient that is not there is 0."""

import math

import pytest
import torch
from vaekl.kernels import cpu, forms

from steps import scale_of
from vaekl import _validate, reference
from vaekl.backends import forms as eager
from vaekl.testing import make_inputs


def test_every_place_has_the_same_forms():
    """See "Adding a form of the scale" in CONTRIBUTING.md."""
    places = {"vaekl/reference/": reference.SCALES, "vaekl/backends/forms.py": eager.FORMS,
              "kernels/forms.py": forms.FORMS, "kernels/cpu/forms.py": cpu.FORMS,
              "vaekl/_validate.py": dict.fromkeys(_validate.SCALES)}  # fmt: skip
    names = {name for table in places.values() for name in table}
    lacking = {path: names - table.keys() for path, table in places.items()}
    assert not {path: few for path, few in lacking.items() if few}


@pytest.mark.parametrize("scale", reference.SCALES)
@pytest.mark.parametrize("worst", [math.inf, math.nan])
@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (None, 1.0), (-1.0, None)])
def test_no_gradient_reaches_what_is_clamped(worst, bounds, scale, storage, backend, device):
    """Whatever comes in: a product with 0 would let it through."""
    mu, logvar = make_inputs((3, 4), device=device)
    logvar[:], logvar[:, 1] = 0.5, 2.0 if bounds[0] is None else -2.0
    tensors = [t.requires_grad_() for t in storage.store(mu, scale_of(scale, logvar))]
    z = storage.call(*tensors, scale=scale, clamp=bounds, seed=1, backend=backend).z
    _, dscale = storage.halves(*torch.autograd.grad(z, tensors, torch.full_like(z, worst)))
    assert (dscale[:, 1] == 0).all()
    assert not dscale[:, 2:].isfinite().any()
