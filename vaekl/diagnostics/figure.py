"""The figure of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def bars(
    values: Mapping[str, Any], totals: Mapping[str, float], names: Sequence[str], dimensions: int
) -> Figure:
    """Bars of aggregate KL and information, both KLs marked.

    Args:
        values: Of each dimension shown, float64 arrays [len(names)] of kl, kl_of_mean,
            aggregate_kl and information.
        totals: Of each of these, over all dimensions.
        names: Of the dimensions shown.
        dimensions: How many there are.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot() needs matplotlib: pip install matplotlib") from error
    label = {
        name: f"{words} ({totals[name]:.4g})"
        for name, words in (
            ("kl", "mean of the KLs"),
            ("kl_of_mean", "KL of the mean"),
            ("aggregate_kl", "aggregate KL"),
            ("information", "information"),
        )
    }
    figure = Figure(figsize=(max(7.0, min(0.32 * len(names) + 2, 16.0)), 5), layout="constrained")
    axes, at = figure.subplots(), range(len(names))
    aggregate, information = values["aggregate_kl"], values["information"]
    axes.bar(at, aggregate, color="tab:gray", label=label["aggregate_kl"])
    axes.bar(
        at, information, bottom=aggregate, color="tab:green", alpha=0.6, label=label["information"]
    )
    axes.plot(at, values["kl"], "_", color="black", ms=14, mew=2, label=label["kl"])
    axes.plot(at, values["kl_of_mean"], "D", color="tab:orange", ms=5, label=label["kl_of_mean"])
    turned = any(len(name) > 2 for name in names) or len(names) > 32
    axes.set_xticks(list(at), names, rotation=90 if turned else 0)
    which = "dimension"
    if len(names) < dimensions:
        which = f"the {len(names)} of {dimensions} dimensions of the largest KL"
    axes.set(xlabel=which, ylabel="nats per sample", xlim=(-0.7, len(names) - 0.3))
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
