"""The oracle: NumPy float64, written from the formulas, and the plain torch code users have today.

Nothing here is shared with a backend. Slow, plain, and what every test compares with.
"""

from .arrays import Array, to_numpy
from .diagnostics import diagnostics
from .gaussian import SCALES, kl_between, nll, phi
from .noise import SEED_OFFSET, normal, philox4x32
from .oracle import Oracle, moments_gradient, moments_oracle
from .plain import torch_reparameterize_kl

__all__ = [
    "SCALES",
    "SEED_OFFSET",
    "Array",
    "Oracle",
    "diagnostics",
    "kl_between",
    "moments_gradient",
    "moments_oracle",
    "nll",
    "normal",
    "phi",
    "philox4x32",
    "to_numpy",
    "torch_reparameterize_kl",
]
