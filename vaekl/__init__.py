"""vaekl: the VAE's sample and both KL terms, fused, exact and reproducible."""

from importlib.metadata import version as _version

from . import nn, reference
from .diagnostics import DiagnosticsAccumulator, DiagnosticsReport, diagnose
from .functional import ReparamKL, kl_loss, kl_of_mean, reparameterize, reparameterize_kl

__version__ = _version("vaekl")

__all__ = [
    "DiagnosticsAccumulator",
    "DiagnosticsReport",
    "ReparamKL",
    "diagnose",
    "kl_loss",
    "kl_of_mean",
    "nn",
    "reference",
    "reparameterize",
    "reparameterize_kl",
]
