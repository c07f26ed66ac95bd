"""The plain torch forms of the reference against the oracle."""

import pytest
import torch

from vaekl.reference import Oracle, torch_reparameterize_kl


@pytest.mark.parametrize("batch_dims", [0, 1, 2, 3])
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
@pytest.mark.parametrize("mean_over", ["batch", "all"])
def test_plain_forms_are_the_oracle(batch_dims, reduction, mean_over):
    options = {"batch_dims": batch_dims, "reduction": reduction, "mean_over": mean_over}
    mu, logvar, eps = torch.randn(3, 2, 4, 5, dtype=torch.float64).unbind()
    z, kl, kl_of_mean = torch_reparameterize_kl(mu, logvar, eps, clamp=(-1.0, 0.5), **options)
    oracle = Oracle(mu, logvar, eps, clamp=(-1.0, 0.5), **options)
    for values, exact in ((z, oracle.z), (kl, oracle.kl), (kl_of_mean, oracle.kl_of_mean)):
        assert values.shape == exact.shape
        torch.testing.assert_close(values, torch.as_tensor(exact), rtol=1e-12, atol=1e-14)
