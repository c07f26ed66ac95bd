"""What the statistics of a batch say: the report, and the formulas behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vaekl.backends.eager import phi

from . import views
from .statistics import Statistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A dimension is active where the variance of mu over the samples is above this (Burda, Grosse &
#: Salakhutdinov 2016, section 5.2).
ACTIVE_VARIANCE = 0.01
#: A dimension is collapsed where its mean KL, in nats, is below this: hardly any sample's
#: posterior differs from the prior (as the epsilon of Lucas et al. 2019, for the mean).
COLLAPSED_KL = 0.01


@dataclass(frozen=True, eq=False)
class DiagnosticsReport:
    """KLs in nats per sample, and what the code carries; made by :func:`vaekl.diagnose`.

    What ends in ``_dims``, the moments (``mean_...``, ``var_mu``) and the flags ``active`` and
    ``collapsed`` are per dimension: float64 (counts int64, flags bool) tensors on the CPU of the
    shape of an event, ``mu.shape[batch_dims:]``. All else are numbers: sums over the dimensions,
    and how many there are (``..._units``).

    With m, l, the means of mu and logvar over the samples, E the mean of e^logvar and V the
    variance of mu: ``k(m, l) = (m² + e^l − 1 − l) / 2`` is the KL of a Gaussian to N(0, 1), and
    N(m, E + V) is the *aggregate*: the one Gaussian with the mean and variance of all samples'
    codes together.

    For every dimension ``kl_dims = aggregate_kl_dims + information_dims`` (the ELBO surgery of
    Hoffman & Johnson 2016, with the aggregate posterior replaced by that Gaussian).

    Where mu or logvar is not finite, the dimension's values and the totals are NaN.
    """

    samples: int
    """Number of samples, B."""
    kl_dims: Tensor
    """Mean of the KLs of the samples, in nats."""
    kl_of_mean_dims: Tensor
    """KL of the mean parameters, k(m, l), in nats."""
    kl_of_mean_all: float
    """KL of the mean parameters over every axis, one pair: the form with ``mean_over="all"``."""
    aggregate_kl_dims: Tensor
    """KL of the aggregate to the prior in nats, (m² + E + V - 1 - log(E + V)) / 2."""
    information_dims: Tensor
    """(log(E + V) - l) / 2 ≥ 0, in nats: the mean KL of the samples to the aggregate. It bounds
    from above what a code in this dimension tells about which sample it is of (their mutual
    information)."""
    mean_mu: Tensor
    """Mean of mu, m."""
    var_mu: Tensor
    """Variance of mu over the samples, V (divided by B)."""
    mean_logvar: Tensor
    """Mean of logvar, l."""
    mean_var: Tensor
    """Mean of exp(logvar), E."""
    nonfinite_mu_dims: Tensor
    """How many values of mu are NaN or infinite."""
    nonfinite_logvar_dims: Tensor
    """How many values of logvar are NaN or infinite."""
    logvar_outside_dims: Tensor
    """How many finite values of logvar are outside [-30, 20], where float32 has little use for
    exp(logvar) and implementations often clamp."""

    @property
    def kl(self) -> float:
        """The mean of the KLs, as ``kl_loss(mu, logvar)``: the ELBO's term."""
        return float(self.kl_dims.sum())

    @property
    def kl_of_mean(self) -> float:
        """The KL of the mean parameters, as ``kl_of_mean(mu, logvar)``; never above ``kl``."""
        return float(self.kl_of_mean_dims.sum())

    @property
    def aggregate_kl(self) -> float:
        """Sum of ``aggregate_kl_dims``."""
        return float(self.aggregate_kl_dims.sum())

    @property
    def information(self) -> float:
        """Sum of ``information_dims``, in nats; the gap ``kl - aggregate_kl``."""
        return float(self.information_dims.sum())

    @property
    def active(self) -> Tensor:
        """Which dimensions are active: V > 0.01 (Burda et al. 2016)."""
        return self.var_mu > ACTIVE_VARIANCE

    @property
    def active_units(self) -> int:
        """How many dimensions are active."""
        return int(self.active.sum())

    @property
    def collapsed(self) -> Tensor:
        """Which dimensions are collapsed: a mean KL below 0.01 nats."""
        return self.kl_dims < COLLAPSED_KL

    @property
    def collapsed_units(self) -> int:
        """How many dimensions are collapsed."""
        return int(self.collapsed.sum())

    @property
    def dimensions(self) -> int:
        """Elements per event, D."""
        return self.kl_dims.numel()

    @property
    def nonfinite(self) -> int:
        """How many values of mu and logvar are NaN or infinite."""
        return int(self.nonfinite_mu_dims.sum() + self.nonfinite_logvar_dims.sum())

    @property
    def logvar_outside(self) -> int:
        """How many values of logvar are finite and outside [−30, 20]."""
        return int(self.logvar_outside_dims.sum())

    @property
    def logvar_outside_share(self) -> float:
        """The share of logvar that is finite and outside [−30, 20]."""
        return self.logvar_outside / (self.samples * self.dimensions)

    @property
    def verdict(self) -> str:
        """One sentence."""
        return views.verdict(self)

    def __str__(self) -> str:
        return views.text(self)

    def __repr__(self) -> str:
        return f"<DiagnosticsReport of {self.samples} samples: {self.verdict}>"

    def to_dict(self, *, per_dimension: bool = False) -> dict[str, float]:
        """The totals as flat floats, for TensorBoard, W&B and the like.

        NaN where mu or logvar is not finite, and of this JSON has none (Python writes a NaN that
        other parsers refuse):

        ```python
        known = {name: x if math.isfinite(x) else None for name, x in report.to_dict().items()}
        line = json.dumps(known, allow_nan=False)
        ```

        Args:
            per_dimension: Also every dimension of ``kl_dims``, ``kl_of_mean_dims``,
                ``aggregate_kl_dims``, ``information_dims`` and ``var_mu``, as ``"kl_dims/0"``.
        """
        result = {name: float(getattr(self, name)) for name in views.TOTALS}
        if per_dimension:
            for name in views.PER_DIMENSION:
                values = getattr(self, name).flatten().tolist()
                result |= {f"{name}/{i}": value for i, value in enumerate(values)}
        return result

    def plot(self, *, most: int = 64) -> Figure:
        """A figure: a bar for each dimension, aggregate KL and information, and both KLs marked.

        Args:
            most: Bars at most; where there are more dimensions, those of the largest KL.

        Raises:
            TypeError, ValueError: ``most`` is no number of bars.
            ModuleNotFoundError: matplotlib is not installed.
        """
        return views.figure(self, most)


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
    return DiagnosticsReport(
        samples=s.samples,
        kl_dims=values(0.5 * (mean * mean + var + s.mean_phi)),
        kl_of_mean_dims=values(0.5 * (mean * mean + phi(log_mean))),
        kl_of_mean_all=float(0.5 * (every[0] * every[0] + phi(every[1]))),
        aggregate_kl_dims=values(0.5 * (mean * mean + phi(log_aggregate)), unknown | beyond),
        information_dims=values(0.5 * information, unknown | beyond),
        mean_mu=values(mean),
        var_mu=values(var),
        mean_logvar=values(log_mean),
        mean_var=values(s.mean_exp),
        nonfinite_mu_dims=s.nonfinite_mu.reshape(s.event),
        nonfinite_logvar_dims=s.nonfinite_logvar.reshape(s.event),
        logvar_outside_dims=s.logvar_outside.reshape(s.event),
    )
