"""The formulas of a report."""

from __future__ import annotations

import torch
from torch import Tensor

from vaekl.backends.eager import phi

from .report import DiagnosticsReport
from .statistics import Gaussian, Statistics


def evaluate(s: Statistics) -> DiagnosticsReport:
    """The report, with no difference of nearly equal numbers.

    phi(l) = e^l − 1 − l has what is left of a KL where posterior and prior nearly agree, so E − 1
    is taken as mean phi + l, and (as the mean of l − l̄ is 0)

        information = log1p(J + V e^−l) / 2,   J = mean e^(l_b − l) − 1 = e^−l (mean phi − phi(l)).

    Far below l = 0 it is phi that has lost e^l, and E itself is taken.
    """
    mean, log_mean = s.mean_mu, s.mean_logvar
    var = s.squares_mu / s.samples
    low = log_mean < -1.0
    scale = torch.exp(-log_mean)
    spread = torch.where(low, s.mean_exp * scale - 1, (s.mean_phi - phi(log_mean)) * scale)
    ratio = spread.clamp_min(0) + var * scale
    excess = var + torch.where(low, s.mean_exp - 1, s.mean_phi + log_mean)
    aggregate = s.mean_exp + var
    log_aggregate = torch.where(excess.abs() < 0.5, excess.log1p(), aggregate.log())
    information = torch.where(ratio < 1, ratio.log1p(), log_aggregate - log_mean)
    unknown = (s.nonfinite_mu + s.nonfinite_logvar) > 0
    # Finite logvar whose exponential float64 does not hold.
    beyond = (aggregate == 0) | aggregate.isinf()

    def values(values: Tensor, unknown: Tensor = unknown) -> Tensor:
        return values.masked_fill(unknown, torch.nan).reshape(s.event)

    every = values(mean).mean(), values(log_mean).mean()
    of_prior = s.prior or Gaussian(*torch.zeros(2, 1, dtype=torch.float64, device="cpu"))
    prior_var = of_prior.logvar.exp()
    return DiagnosticsReport(
        samples=s.samples,
        kl_dims=values(0.5 * (mean * mean + var + s.mean_phi)),
        kl_of_mean_dims=values(0.5 * (mean * mean + phi(log_mean))),
        kl_of_mean_all=float(0.5 * (every[0] * every[0] + phi(every[1]))),
        aggregate_kl_dims=values(0.5 * (mean * mean + phi(log_aggregate)), unknown | beyond),
        information_dims=values(0.5 * information, unknown | beyond),
        mean_mu=values(of_prior.mean + mean * prior_var.sqrt()),
        var_mu=values(var * prior_var),
        mean_logvar=values(of_prior.logvar + log_mean),
        mean_var=values(s.mean_exp * prior_var),
        nonfinite_mu_dims=s.nonfinite_mu.reshape(s.event),
        nonfinite_logvar_dims=s.nonfinite_logvar.reshape(s.event),
        logvar_outside_dims=s.logvar_outside.reshape(s.event),
        prior_var=None if s.prior is None else prior_var.reshape(s.event),
    )
