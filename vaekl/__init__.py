"""vaekl: the VAE's sample and both KL terms, fused, exact and reproducible."""

# _checkout first: it is how all others find the kernels in a checkout.
from . import _checkout, distributions, nn, reference  # noqa: F401
from ._log_prob import reparameterize_log_prob
from ._spec import ReparamKL, ReparamLogProb
from .diagnostics import DiagnosticsAccumulator, DiagnosticsReport, diagnose
from .distributions import patch_diffusers
from .functional import (
    kl_loss,
    kl_of_mean,
    reparameterize,
    reparameterize_kl,
    reparameterize_kl_moments,
)

#: What pyproject.toml reads; an application frozen into one file has no metadata.
__version__ = "0.1.0"

__all__ = [
    "DiagnosticsAccumulator",
    "DiagnosticsReport",
    "ReparamKL",
    "ReparamLogProb",
    "diagnose",
    "distributions",
    "kl_loss",
    "kl_of_mean",
    "nn",
    "patch_diffusers",
    "reference",
    "reparameterize",
    "reparameterize_kl",
    "reparameterize_kl_moments",
    "reparameterize_log_prob",
]
