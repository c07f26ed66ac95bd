"""vaekl: the VAE's sample and both KL terms, fused, exact and reproducible."""

from importlib.metadata import version as _version

from . import nn, reference
from .functional import (
    ReparamKL,
    kl_loss,
    kl_of_mean,
    reparameterize,
    reparameterize_kl,
    reparameterize_kl_moments,
)

__version__ = _version("vaekl")

__all__ = [
    "ReparamKL",
    "kl_loss",
    "kl_of_mean",
    "nn",
    "reference",
    "reparameterize",
    "reparameterize_kl",
    "reparameterize_kl_moments",
]
