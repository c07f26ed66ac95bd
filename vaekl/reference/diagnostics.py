"""What ``vaekl.diagnose`` reports, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import Array, to_numpy
from .gaussian import SCALES, phi


def diagnostics(
    mu: Any,
    logvar: Any,
    batch_dims: int = 1,
    scale: str = "logvar",
    prior: tuple[Any, Any] | None = None,
) -> dict[str, Array]:
    """What ``vaekl.diagnose`` reports, per dimension [D], each from its definition.

    ``aggregate_kl_dims`` is the KL to the prior of the Gaussian with the mean and variance of all
    samples' posteriors together, ``information`` the mean KL of the samples' posteriors to it.
    Beside a prior, [D], these are of posteriors in its standard deviations.
    """
    wide, form = np.longdouble, SCALES[scale]
    batch = int(np.prod(np.shape(mu)[:batch_dims], dtype=np.int64))
    raw, given = (to_numpy(t).reshape(batch, -1).astype(wide) for t in (mu, logvar))
    of_mean, of_scale = (to_numpy(t).ravel().astype(wide) for t in prior or (0.0, form.one))
    prior_std = np.exp(form.logvar(of_scale) / 2)
    m, v = (raw - of_mean) / prior_std, form.logvar(given) - form.logvar(of_scale)
    mean, mean_logvar = m.mean(0), v.mean(0)
    var = ((m - mean) ** 2).mean(0)
    # log of mean e^l + var, and the variance about 1, which a collapsed posterior is close to.
    log_aggregate = np.log1p(np.expm1(v).mean(0) + var)
    ratio = (v - log_aggregate).astype(np.float64)
    distances = (m - mean) ** 2 / np.exp(log_aggregate)
    values = {
        "kl_dims": (m * m + form.terms(given, of_scale)[1]).mean(0) / 2,
        "kl_of_mean_dims": (mean**2 + phi(mean_logvar.astype(np.float64))) / 2,
        "kl_of_mean_all": (m.mean() ** 2 + phi(np.asarray(v.mean(), np.float64))) / 2,
        "aggregate_kl_dims": (mean**2 + phi(log_aggregate.astype(np.float64))) / 2,
        "information_dims": (phi(ratio) + distances).mean(0) / 2,
        "mean_mu": raw.mean(0),
        "var_mu": var * prior_std**2,
        "mean_logvar": form.logvar(given).mean(0),
        "mean_var": np.exp(form.logvar(given)).mean(0),
    }
    return {name: np.asarray(value, dtype=np.float64) for name, value in values.items()}
