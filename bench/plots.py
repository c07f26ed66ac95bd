"""Plots of a results file: bandwidth against the copy ceiling, speed-up, growth curve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from cases import GROWTH_EVENT, MODES
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from providers import PROVIDERS

Row = dict[str, Any]

#: The same colour for a provider in every plot; vaekl's backends stand out.
COLORS = dict(zip((p.name for p in PROVIDERS if not p.name.startswith("vaekl")),
                  ("0.6", "tab:blue", "tab:green", "tab:purple")))  # fmt: skip
COLORS |= {"vaekl-eager": "tab:orange", "vaekl-triton": "tab:red", "vaekl-cpu": "tab:red"}
#: Fewer elements say nothing about bandwidth: the time goes into launching.
BANDWIDTH_ELEMENTS = 2**17


def draw(results: dict[str, Any], path: Path) -> Iterator[Path]:
    """Write the plots beside the results file; yields their paths."""
    for name, figure in (
        ("bandwidth", bandwidth(results)),
        ("speedup", speedup(results)),
        ("growth", growth(results)),
    ):
        if figure is not None:
            target = path.with_name(f"{path.stem}-{name}.png")
            with matplotlib.rc_context({"font.size": 11}):
                figure.savefig(target, dpi=130)
            yield target


def _panels(results: dict[str, Any], title: str, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with one panel a mode."""
    figure = Figure(figsize=(11, height), layout="constrained")
    device = results["device"]
    figure.suptitle(f"{title}\n{device['name']}, torch {device['versions']['torch']}")
    axes = figure.subplots(1, len(MODES), sharey=True)
    for panel, mode in zip(axes, MODES):
        panel.set_title(mode)
    return figure, list(axes)


def _names(rows: list[Row]) -> list[str]:
    """Providers in the order of the registry."""
    present = {row["provider"] for row in rows}
    return [p.name for p in PROVIDERS if p.name in present]


def _bars(panel: Axes, rows: list[Row], cases: list[str], names: list[str], text: str) -> None:
    """Horizontal bars of row["bar"], grouped by case, each with its figure."""
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        mine = {row["case"]: row["bar"] for row in rows if row["provider"] == name}
        places = [k + (i + 0.5) * height - 0.4 for k, case in enumerate(cases) if case in mine]
        values = [mine[case] for case in cases if case in mine]
        bars = panel.barh(places, values, height, color=COLORS[name], label=name)
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        panel.bar_label(bars, fmt=text, padding=3, fontsize=8, bbox=behind)
    panel.set_yticks(range(len(cases)), cases)
    panel.set_ylim(len(cases) - 0.5, -0.5)
    panel.margins(x=0.12)


def bandwidth(results: dict[str, Any]) -> Figure | None:
    """Bytes that have to be moved, per second, beside what a copy reaches."""
    rows = [r for r in results["rows"] if r["both"] and r["elements"] >= BANDWIDTH_ELEMENTS]
    cases, names = list(dict.fromkeys(r["case"] for r in rows)), _names(rows)
    if not rows:
        return None
    height = 2.2 + 0.22 * len(cases) * len(names)
    figure, axes = _panels(
        results, "Bandwidth of the bytes that have to be moved, both KLs", height
    )
    copy = results["copy_bytes_per_second"] / 1e9
    for panel, mode in zip(axes, MODES):
        mine = [
            {**r, "bar": r["floor_bytes"] / r.get("device_seconds", r["seconds"]) / 1e9}
            for r in rows
            if r["mode"] == mode
        ]
        _bars(panel, mine, cases, names, "%.3g")
        panel.axvline(
            copy, color="black", linestyle="--", zorder=0.5, label=f"copy: {copy:.3g} GB/s"
        )
        panel.set_xlabel("GB/s")
    _legend(figure, axes)
    return figure


def speedup(results: dict[str, Any]) -> Figure | None:
    """Time of plain torch over the time of each other provider."""
    base = {
        (r["case"], r["both"], r["mode"]): r["seconds"]
        for r in results["rows"]
        if r["provider"] == "plain"
    }
    rows = [
        {**r, "bar": base[r["case"], r["both"], r["mode"]] / r["seconds"]}
        for r in results["rows"]
        if r["both"] and r["provider"] != "plain" and (r["case"], r["both"], r["mode"]) in base
    ]
    cases, names = list(dict.fromkeys(r["case"] for r in rows)), _names(rows)
    if not rows:
        return None
    height = 2.2 + 0.22 * len(cases) * len(names)
    figure, axes = _panels(results, "Speed-up over plain torch, both KLs", height)
    for panel, mode in zip(axes, MODES):
        _bars(panel, [r for r in rows if r["mode"] == mode], cases, names, "%.2f")
        panel.axvline(1, color="black", linestyle="--", zorder=0.5, label="plain torch")
        panel.set_xlabel("times as fast as plain torch")
    _legend(figure, axes)
    return figure


def growth(results: dict[str, Any]) -> Figure | None:
    """Time per element over the number of elements, at one event size."""
    rows = [r for r in results["rows"] if r["both"] and r["growth"]]
    if not rows:
        return None
    figure, axes = _panels(
        results, f"Time per element, shape [B, {GROWTH_EVENT}] fp32, both KLs", 5
    )
    for panel, mode in zip(axes, MODES):
        for name in _names(rows):
            points = sorted(
                (r["elements"], r["seconds"] / r["elements"] * 1e9)
                for r in rows
                if r["provider"] == name and r["mode"] == mode
            )
            panel.loglog(*zip(*points), "o-", color=COLORS[name], label=name)
        panel.set_xlabel("elements")
        panel.grid(which="major", alpha=0.3)
    axes[0].set_ylabel("ns per element")
    _legend(figure, axes)
    return figure


def _legend(figure: Figure, axes: list[Axes]) -> None:
    """One legend for all panels, below them."""
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
