"""What the statistics of a batch say, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vaekl import _validate
from vaekl._spec import LOGVAR_RANGE

from .figure import bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A dimension is active where the variance of mu over the samples is above this (Burda, Grosse &
#: Salakhutdinov 2016, section 5.2).
ACTIVE_VARIANCE = 0.01
#: A dimension is collapsed where its mean KL, in nats, is below this: hardly any sample's
#: posterior differs from the prior (as the epsilon of Lucas et al. 2019, for the mean).
COLLAPSED_KL = 0.01

#: What to_dict gives, by the report's own names.
TOTALS = ("kl", "kl_of_mean", "kl_of_mean_all", "aggregate_kl", "information",
          "active_units", "collapsed_units", "dimensions", "samples", "logvar_outside_share",
          "nonfinite")  # fmt: skip
PER_DIMENSION = (
    "kl_dims", "kl_of_mean_dims", "aggregate_kl_dims", "information_dims", "var_mu"
)  # fmt: skip
_RANGE = "[{:g}, {:g}]".format(*LOGVAR_RANGE)
_ROWS = 16  # dimensions that the table shows


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

    To another prior N(m', e^l') than N(0, 1) these are KLs of codes in its standard deviations,
    (m − m') e^(−l'/2) and l − l', which are the KLs to it; ``mean_...`` and ``var_mu`` are of the
    codes as they are.

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
    prior_var: Tensor | None = None
    """Variance of the prior; None of N(0, I)."""

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
        """Which dimensions are active: V > 0.01 (Burda et al. 2016) of the prior's variance."""
        return self.var_mu > ACTIVE_VARIANCE * (1.0 if self.prior_var is None else self.prior_var)

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
        return _verdict(self)

    def __str__(self) -> str:
        return _text(self)

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
        result = {name: float(getattr(self, name)) for name in TOTALS}
        if per_dimension:
            for name in PER_DIMENSION:
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
        _validate.integer("most", most, 1, 2**31)
        shown = _largest(self, most)
        terms = ("kl", "kl_of_mean", "aggregate_kl", "information")
        return bars(
            {name: getattr(self, f"{name}_dims").flatten()[shown].numpy() for name in terms},
            {name: getattr(self, name) for name in terms},
            [_index(self, i) for i in shown.tolist()],
            self.dimensions,
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _names(report: DiagnosticsReport, mask: Tensor, most: int = 8) -> str:
    """Indices where the mask holds, as a user would index an event."""
    found = [str(i[0] if len(i) == 1 else tuple(i)) for i in mask.nonzero()[:most].tolist()]
    more = int(mask.sum()) - len(found)
    return ", ".join(found) + (f" and {more} more" if more else "")


def _verdict(report: DiagnosticsReport) -> str:
    """The most important thing first, in one sentence."""
    if report.nonfinite:
        parts = [
            f"{count} of {name}"
            for name, count in (
                ("mu", int(report.nonfinite_mu_dims.sum())),
                ("logvar", int(report.nonfinite_logvar_dims.sum())),
            )
            if count
        ]
        bad = (report.nonfinite_mu_dims + report.nonfinite_logvar_dims) > 0
        where = f" in {_dimension(bad)} {_names(report, bad)}" if bad.dim() else ""
        return (
            f"{_count(report.nonfinite, 'value')} not finite ({', '.join(parts)}){where}: what "
            "depends on them is NaN."
        )
    more = ""
    if report.collapsed_units < report.dimensions and report.aggregate_kl > report.kl / 2:
        share = f"{report.aggregate_kl:.3g} of {report.kl:.3g} nats"
        more = f"; most of the KL ({share}) is how far all codes together are from the prior"
    if report.logvar_outside_share:
        more += f"; {_percent(report.logvar_outside_share)} of logvar is outside {_RANGE}"
    collapsed, dimensions = report.collapsed_units, report.dimensions
    if collapsed == dimensions:
        all_of = "The only dimension is" if dimensions == 1 else f"All {dimensions} dimensions are"
        return f"{all_of} collapsed: the codes say next to nothing about the samples{more}."
    carried = float(report.information_dims[~report.collapsed].sum())
    at_most = f"at most {carried:.3g} nats about which sample a code is of"
    if collapsed:
        verb = "is" if collapsed == 1 else "are"
        rest = dimensions - collapsed
        others = "the other one carries" if rest == 1 else f"the other {rest} carry"
        some = f"{collapsed} of {dimensions} dimensions {verb} collapsed"
        return f"{some}; {others} {at_most}{more}."
    if dimensions == 1:
        return f"The only dimension is not collapsed and carries {at_most}{more}."
    return f"None of {dimensions} dimensions is collapsed; together they carry {at_most}{more}."


def _dimension(mask: Tensor) -> str:
    return "dimension" if int(mask.sum()) == 1 else "dimensions"


def _percent(share: float) -> str:
    return f"{share:.2%}" if share == 0 or share >= 0.0001 else "under 0.01%"


def _text(report: DiagnosticsReport) -> str:
    """The totals, the dimensions of the largest KL, and the verdict."""
    D = report.dimensions
    totals = [
        ("mean of the KLs (the ELBO's)", f"{report.kl:.5g}"),
        ("KL of the mean, over the batch", f"{report.kl_of_mean:.5g}"),
        ("KL of the mean, over all axes", f"{report.kl_of_mean_all:.5g}"),
        ("aggregate KL", f"{report.aggregate_kl:.5g}"),
        ("information", f"{report.information:.5g}"),
        (_active(report), f"{report.active_units} of {D}"),
        ("collapsed (KL < 0.01)", f"{report.collapsed_units} of {D}"),
        (f"logvar outside {_RANGE}", _percent(report.logvar_outside_share)),
        ("not finite", str(report.nonfinite)),
    ]
    size = f"{_count(report.samples, 'sample')}, {_count(D, 'dimension')}"
    lines = [f"{size}; KLs in nats per sample"]
    lines += [f"  {name:<32}{value:>10}" for name, value in totals]
    shown = _largest(report, _ROWS)
    lines += ["", _cells("dim", "KL", "aggregate", "information", "KL of mean", "Var mu")]
    columns = [getattr(report, name).flatten()[shown].tolist()
               for name in ("kl_dims", "aggregate_kl_dims", "information_dims", "kl_of_mean_dims",
                            "var_mu")]  # fmt: skip
    collapsed = report.collapsed.flatten()
    for i, *values in zip(shown.tolist(), *columns):
        mark = "  collapsed" if collapsed[i] else ""
        lines.append(_cells(_index(report, i), *(f"{value:.4g}" for value in values)) + mark)
    if D > len(shown):
        lines.append(f"  ... and {D - len(shown)} of smaller KL")
    return "\n".join([*lines, "", report.verdict])


def _active(report: DiagnosticsReport) -> str:
    if report.prior_var is None:
        return f"active units (Var mu > {ACTIVE_VARIANCE})"
    return f"active (Var mu > {ACTIVE_VARIANCE} of prior)"


def _cells(first: str, *others: str) -> str:
    return f"  {first:<10}" + "".join(f"{cell:>13}" for cell in others)


def _index(report: DiagnosticsReport, flat: int) -> str:
    """Of a flat position, as a user would index an event."""
    return ",".join(str(i) for i in np.unravel_index(flat, report.kl_dims.shape)) or "-"


def _largest(report: DiagnosticsReport, most: int) -> Tensor:
    """Flat positions: all in order if they are few, else those of the largest KL first."""
    values = report.kl_dims.flatten()
    if len(values) <= most:
        return torch.arange(len(values), device="cpu")
    return values.argsort(descending=True, stable=True)[:most]  # NaN is first to torch
