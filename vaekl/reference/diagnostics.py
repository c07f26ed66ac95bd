"""What ``vaekl.diagnose`` reports, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import Array, to_numpy
from .gaussian import phi


def diagnostics(mu: Any, logvar: Any, batch_dims: int = 1) -> dict[str, Array]:
    """What ``vaekl.diagnose`` reports, per dimension [D], each from its definition.

    ``aggregate_kl_dims`` is the KL to N(0, 1) of the Gaussian with the mean and variance of all
    samples' posteriors together, ``information`` the mean KL of the samples' posteriors to it.
    """
    wide = np.longdouble
    batch = int(np.prod(np.shape(mu)[:batch_dims], dtype=np.int64))
    m, v = (to_numpy(t).reshape(batch, -1).astype(wide) for t in (mu, logvar))
    mean, mean_logvar = m.mean(0), v.mean(0)
    var = ((m - mean) ** 2).mean(0)
    # log of mean e^l + var, and the variance about 1, which a collapsed posterior is close to.
    log_aggregate = np.log1p(np.expm1(v).mean(0) + var)
    ratio = (v - log_aggregate).astype(np.float64)
    distances = (m - mean) ** 2 / np.exp(log_aggregate)
    values = {
        "kl_dims": (m * m + phi(v.astype(np.float64))).mean(0) / 2,
        "kl_of_mean_dims": (mean**2 + phi(mean_logvar.astype(np.float64))) / 2,
        "kl_of_mean_all": (m.mean() ** 2 + phi(np.asarray(v.mean(), np.float64))) / 2,
        "aggregate_kl_dims": (mean**2 + phi(log_aggregate.astype(np.float64))) / 2,
        "information_dims": (phi(ratio) + distances).mean(0) / 2,
        "mean_mu": mean,
        "var_mu": var,
        "mean_logvar": mean_logvar,
        "mean_var": np.exp(v).mean(0),
    }
    return {name: np.asarray(value, dtype=np.float64) for name, value in values.items()}
