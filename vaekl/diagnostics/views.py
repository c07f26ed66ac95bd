"""A report in words, as a table of plain text, and as a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vaekl import _validate
from vaekl._spec import LOGVAR_RANGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .report import DiagnosticsReport

#: What to_dict gives, by the report's own names.
TOTALS = ("kl", "kl_of_mean", "kl_of_mean_all", "aggregate_kl", "information",
          "active_units", "collapsed_units", "dimensions", "samples", "logvar_outside_share",
          "nonfinite")  # fmt: skip
PER_DIMENSION = (
    "kl_dims", "kl_of_mean_dims", "aggregate_kl_dims", "information_dims", "var_mu"
)  # fmt: skip
_RANGE = "[{:g}, {:g}]".format(*LOGVAR_RANGE)
_ROWS = 16  # dimensions that the table shows


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _names(report: DiagnosticsReport, mask: torch.Tensor, most: int = 8) -> str:
    """Indices where the mask holds, as a user would index an event."""
    found = [str(i[0] if len(i) == 1 else tuple(i)) for i in mask.nonzero()[:most].tolist()]
    more = int(mask.sum()) - len(found)
    return ", ".join(found) + (f" and {more} more" if more else "")


def verdict(report: DiagnosticsReport) -> str:
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


def _dimension(mask: torch.Tensor) -> str:
    return "dimension" if int(mask.sum()) == 1 else "dimensions"


def _percent(share: float) -> str:
    return f"{share:.2%}" if share == 0 or share >= 0.0001 else "under 0.01%"


def text(report: DiagnosticsReport) -> str:
    """The totals, the dimensions of the largest KL, and the verdict."""
    D = report.dimensions
    totals = [
        ("mean of the KLs (the ELBO's)", f"{report.kl:.5g}"),
        ("KL of the mean, over the batch", f"{report.kl_of_mean:.5g}"),
        ("KL of the mean, over all axes", f"{report.kl_of_mean_all:.5g}"),
        ("aggregate KL", f"{report.aggregate_kl:.5g}"),
        ("information", f"{report.information:.5g}"),
        ("active units (Var mu > 0.01)", f"{report.active_units} of {D}"),
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


def _cells(first: str, *others: str) -> str:
    return f"  {first:<10}" + "".join(f"{cell:>13}" for cell in others)


def _index(report: DiagnosticsReport, flat: int) -> str:
    """Of a flat position, as a user would index an event."""
    return ",".join(str(i) for i in np.unravel_index(flat, report.kl_dims.shape)) or "-"


def _largest(report: DiagnosticsReport, most: int) -> torch.Tensor:
    """Flat positions: all in order if they are few, else those of the largest KL first."""
    values = report.kl_dims.flatten()
    if len(values) <= most:
        return torch.arange(len(values), device="cpu")
    return values.argsort(descending=True, stable=True)[:most]  # NaN is first to torch


def figure(report: DiagnosticsReport, most: int) -> Figure:
    """Bars of aggregate KL and information, both KLs marked."""
    _validate.integer("most", most, 1, 2**31)
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot() needs matplotlib: pip install matplotlib") from error
    shown = _largest(report, most)
    aggregate, information, kl, of_mean = (
        getattr(report, name).flatten()[shown].numpy()
        for name in ("aggregate_kl_dims", "information_dims", "kl_dims", "kl_of_mean_dims")
    )
    figure = Figure(figsize=(max(7.0, min(0.32 * len(shown) + 2, 16.0)), 5), layout="constrained")
    axes, at = figure.subplots(), range(len(shown))
    axes.bar(at, aggregate, color="tab:gray", label=f"aggregate KL ({report.aggregate_kl:.4g})")
    label = f"information ({report.information:.4g})"
    axes.bar(at, information, bottom=aggregate, color="tab:green", alpha=0.6, label=label)
    axes.plot(at, kl, "_", color="black", ms=14, mew=2, label=f"mean of the KLs ({report.kl:.4g})")
    label = f"KL of the mean ({report.kl_of_mean:.4g})"
    axes.plot(at, of_mean, "D", color="tab:orange", ms=5, label=label)
    names = [_index(report, i) for i in shown.tolist()]
    turned = any(len(name) > 2 for name in names) or len(names) > 32
    axes.set_xticks(list(at), names, rotation=90 if turned else 0)
    which = "dimension"
    if len(shown) < report.dimensions:
        which = f"the {len(shown)} of {report.dimensions} dimensions of the largest KL"
    axes.set(xlabel=which, ylabel="nats per sample", xlim=(-0.7, len(shown) - 0.3))
    axes.set_ylim(bottom=0)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        title="totals in nats",
        ncols=2,
        frameon=False,
    )
    return figure
