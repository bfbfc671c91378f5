"""The pictures of a report, in the run card's style: whiskers are 95 % intervals, colour is never the only sign."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import ScaledTranslation

from opticnerve.common.drawing import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    figure_of,
    save,
    smooth,
    tidy,
    title_of,
    words,
)  # fmt: skip
from opticnerve.compare.stats import Estimate

_STYLES = tuple(
    zip((BLUE, ORANGE, GREEN, RED, PURPLE, GREY), ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))), strict=True)
)
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def dots(
    panels: Mapping[str, Mapping[str, Estimate | None]],
    path: Path,
    *,
    title: str,
    note: str,
    lines: Mapping[str, float] | None = None,
    line_label: str = "",
) -> Path:
    """Accuracies with whiskers, a row per system and a panel per group of questions.

    Args:
        panels: group → system's title → estimate. lines: group → a baseline that is drawn across.
    """
    names = list(dict.fromkeys(n for panel in panels.values() for n in panel))
    figure = figure_of(2.9 + 2.15 * len(panels), 1.5 + 0.33 * len(names))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (group, panel) in zip(grid, panels.items(), strict=True):
        for y, name in enumerate(names):
            found = panel.get(name)
            if found is not None:
                ends = [[found.mean - found.low], [found.high - found.mean]]
                axes.errorbar([found.mean], [y], xerr=ends, fmt="o", color=BLUE, ecolor=INK, elinewidth=1.2, capsize=3)
        if lines and group in lines:
            axes.axvline(lines[group], color=ORANGE, linestyle="--", linewidth=1.4, label=line_label)
        axes.set_xlim(-0.03, 1.03)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xticks([0, 0.5, 1])
        axes.set_title(group, fontsize=10.5, color=INK, **words())
        axes.set_ylim(len(names) - 0.4, -0.6)
        tidy(axes)
        axes.grid(axis="x", color=FAINT, linewidth=0.9)
    grid[0].set_yticks(range(len(names)), names, fontsize=9.5)
    if lines:
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles[:1], labels[:1], loc="outside lower center", frameon=False, fontsize=9)
    _heading(figure, title, note)
    return save(figure, path)


def scatter(
    points: Mapping[str, tuple[float, Estimate]], path: Path, *, title: str, note: str, x: str, log: bool
) -> Path:
    """Accuracy against a cost, a mark with its name for each system; equal costs are drawn side by side."""
    figure = figure_of(8.2, 4.6)
    axes = figure.subplots()
    many = Counter(cost for cost, _ in points.values())
    drawn: Counter[float] = Counter()
    for i, (name, (cost, found)) in enumerate(points.items()):
        colour = _STYLES[i % len(_STYLES)][0]
        ends = [[found.mean - found.low], [found.high - found.mean]]
        # Rows of one and the same cost stand side by side, 9 pt apart, and not on top of each other.
        aside = 9 * (drawn[cost] - (many[cost] - 1) / 2) / 72
        drawn[cost] += 1
        axes.errorbar(
            [cost], [found.mean], yerr=ends, fmt=_MARKS[i % len(_MARKS)], color=colour, ecolor=colour, elinewidth=1.2,
            capsize=3, markersize=7, label=name,
            transform=axes.transData + ScaledTranslation(aside, 0, figure.dpi_scale_trans),
        )  # fmt: skip
    _room(axes, list(points.values()), log)
    axes.set_xlabel(x)
    axes.set_ylabel("accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    title_of(axes, title, note)
    tidy(axes)
    return save(figure, path)


def _room(axes: Axes, points: Sequence[tuple[float, Estimate]], log: bool) -> None:
    """Limits by hand: matplotlib does not see marks that were moved aside."""
    if not points:
        return
    costs = [c for c, _ in points]
    low, high = min(costs), max(costs)
    if log and low > 0:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.6, high * 1.6)
    else:
        pad = 0.15 * (high - low) or max(1.0, 0.15 * high)
        axes.set_xlim(low - pad, high + pad)
    axes.set_ylim(max(-0.02, min(e.low for _, e in points) - 0.04), min(1.02, max(e.high for _, e in points) + 0.04))


def bands(
    curves: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]], path: Path, *, title: str, note: str,
    x: str, threshold: float | None = None,
) -> Path:  # fmt: skip
    """Smoothed losses, a line per row (the mean over seeds) with the range of the seeds around it.

    Args:
        curves: row's title → for each seed, places on the x axis and losses.
    """
    figure = figure_of(8.6, 4.8)
    axes = figure.subplots()
    for (name, seeds), (colour, style) in zip(
        curves.items(), _STYLES * (1 + len(curves) // len(_STYLES)), strict=False
    ):
        drawable = [(np.asarray(p, float), smooth(np.asarray(v, float))) for p, v in seeds if len(v)]
        if not drawable:
            continue
        start, end = max(p[0] for p, _ in drawable), min(p[-1] for p, _ in drawable)
        places = np.linspace(start, end, 200)
        values = np.array([np.interp(places, p, v) for p, v in drawable])
        axes.fill_between(places, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
        axes.plot(places, values.mean(0), color=colour, linestyle=style, linewidth=2, label=name)
    if threshold is not None:
        axes.axhline(threshold, color=GREY, linewidth=1, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel("loss (nats per trained token)")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    title_of(axes, title, note)
    tidy(axes)
    return save(figure, path)


def bars(values: Mapping[str, float], path: Path, *, title: str, note: str, x: str) -> Path:
    """One bar per row, its value written at its end."""
    figure = figure_of(7.4, 1.4 + 0.42 * max(1, len(values)))
    axes = figure.subplots()
    axes.barh(range(len(values)), list(values.values()), color=BLUE, height=0.62, zorder=2)
    for y, value in enumerate(values.values()):
        axes.text(value, y, f" {value:,.4g}", va="center", fontsize=9.5, color=INK)
    axes.set_yticks(range(len(values)), list(values), fontsize=9.5)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlim(0, max([*values.values(), 1e-9]) * 1.15)
    axes.set_xlabel(x)
    title_of(axes, title, note)
    tidy(axes)
    return save(figure, path)


def _heading(figure: object, title: str, note: str) -> None:
    figure.suptitle(f"{title}\n\n", x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK, **words())  # type: ignore[attr-defined]
    figure.text(0.01, 1 - 0.42 / figure.get_figheight(), note, fontsize=9.5, color="#5A6069", va="top")  # type: ignore[attr-defined]
