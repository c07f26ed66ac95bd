"""Digits that plain float32 loses: near collapse and over the whole range. And the oracle's own."""

import itertools

import numpy as np
import pytest
import torch

import vaekl
from vaekl.reference import Oracle, to_numpy, torch_reparameterize_kl
from vaekl.testing import KL_BUDGET, gradient_bounds, make_inputs, step, worst

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
REDUCTIONS = ["none", "sum", "batchmean", "mean", "per_dim"]


@pytest.mark.parametrize("scale", [10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_near_collapse(scale, dtype, backend, device):
    """Per-sample KL at every scale of logvar; plain float32 has no right digit at 1e-4."""
    mu, logvar = make_inputs((64, 64), dtype=dtype, scale=scale, device=device)
    mu = mu * (1e-3 if scale < 1 else 1.0)
    kl, (upstream,), (dmu, dlogvar) = step(
        lambda m, v: vaekl.kl_loss(m, v, reduction="none", backend=backend), (mu, logvar)
    )
    oracle = Oracle(mu, logvar, reduction="none")
    assert worst(kl, oracle.kl, KL_BUDGET[kl.dtype] * oracle.kl) <= 1
    expected = oracle.gradients(None, upstream)
    bounds = gradient_bounds(oracle, kl.dtype, dtype, None, upstream)
    assert worst(dmu, expected["dmu"], bounds["dmu"]) <= 1
    assert worst(dlogvar, expected["dlogvar"], bounds["dlogvar"]) <= 1


def test_one_element_over_the_whole_range(backend, device):
    """phi and e^l - 1 within a few units everywhere, the seams at |l| = 1 and n ln 2 included."""
    seams = [sign * (1 + d) for sign in (1, -1) for d in (-1e-7, 0.0, 1e-7)]
    logvar = np.concatenate([np.linspace(-80, 80, 4001), np.logspace(-12, 0, 500), seams])
    logvar = np.concatenate([logvar, -np.logspace(-12, 0, 500)])
    l32 = torch.tensor(logvar, dtype=torch.float32, device=device)[:, None].requires_grad_()
    kl = vaekl.kl_loss(torch.zeros_like(l32), l32, reduction="none", backend=backend)
    oracle = Oracle(torch.zeros_like(l32), l32, reduction="none")
    assert worst(kl, oracle.kl, KL_BUDGET[torch.float32] * oracle.kl) <= 1
    kl.sum().backward()
    exact = oracle.gradients(None, np.ones(len(logvar)))["dlogvar"]
    assert worst(l32.grad, exact, 5e-7 * np.abs(exact)) <= 1


def test_oracle_agrees_with_autograd_of_plain_torch():
    """The oracle itself, against plain torch in float64."""
    for reduction, mean_over, batch_dims in itertools.product(REDUCTIONS, ("batch", "all"), (1, 2)):
        mu, logvar = make_inputs((4, 3, 5), dtype=torch.float64)
        eps = make_inputs((4, 3, 5), dtype=torch.float64, seed=2)[0]
        options = {"reduction": reduction, "mean_over": mean_over, "batch_dims": batch_dims}
        options["clamp"] = (-1.0, 1.0)
        plain, upstream, gradients = step(
            lambda *t, o=options: torch_reparameterize_kl(*t, **o), (mu, logvar, eps)
        )
        oracle = Oracle(mu, logvar, eps, **options)
        for out, expected in zip(plain, (oracle.z, oracle.kl, oracle.kl_of_mean)):
            np.testing.assert_allclose(to_numpy(out), expected, rtol=1e-10)
        for gradient, name in zip(gradients, ("dmu", "dlogvar", "deps")):
            np.testing.assert_allclose(
                to_numpy(gradient), oracle.gradients(*upstream)[name], rtol=1e-9, atol=1e-12
            )
