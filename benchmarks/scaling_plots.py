"""The plots of `scaling.py`, in the house's look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from side_by_side import Trial

from opticnerve.common.drawing import BLUE, FAINT, GREY, INK, ORANGE, figure_of, save, tidy, title_of, words

GIB = 2**30
Series = dict[str, list[tuple[int, Trial]]]
STYLES = [(BLUE, "o", "-"), (ORANGE, "s", "-")]


def draw(spec: Any, found: Series, path: Path) -> Path:
    """Seconds a sample and peak memory, each against what grows."""
    figure = figure_of(10.5, 4.4)
    time, memory = figure.subplots(1, 2)
    for (name, points), style in zip(found.items(), STYLES, strict=False):
        values = [v for v, _ in points]
        _line(time, values, [t.seconds / t.units for _, t in points], style, name)
        _line(memory, values, [t.peak_bytes / GIB for _, t in points], style, name)
    _line(
        memory, *_sorted([(v, t.notes["before_bytes"] / GIB) for points in found.values() for v, t in points]),
        (GREY, "", ":"), "before the first step",
    )  # fmt: skip
    if spec.proportion:
        _proportion(time)
    _finish(time, spec.label, "seconds a sample")
    _finish(memory, spec.label, "peak resident memory, GiB")
    title_of(time, spec.title, spec.note)
    time.legend(frameon=False, fontsize=9, loc="upper left")
    memory.legend(frameon=False, fontsize=9, loc="upper left")
    return save(figure, path)


def draw_rows(spec: Any, found: Series, path: Path) -> Path:
    """Seconds to the first step, seconds a step, and resident memory, each against the rows."""
    [points] = found.values()
    values = [v for v, _ in points]
    figure = figure_of(13, 4.4)
    first, step, memory = figure.subplots(1, 3)
    _line(first, values, [t.notes["first_step_seconds"] for _, t in points], STYLES[0], "")
    _proportion(first)
    _line(step, values, [t.seconds for _, t in points], STYLES[0], "")
    _line(memory, values, [t.notes["resident_bytes"] / GIB for _, t in points], STYLES[0], "while training")
    _line(memory, values, [t.notes["before_bytes"] / GIB for _, t in points], (GREY, "", ":"), "before the stage")
    _finish(first, spec.label, "seconds to the first step")
    _finish(step, spec.label, "seconds a step")
    _finish(memory, spec.label, "resident memory, GiB")
    title_of(first, spec.title, spec.note)
    memory.legend(frameon=False, fontsize=9, loc="upper left")
    return save(figure, path)


def _line(axes: Axes, values: Sequence[int], figures: Sequence[float], style: tuple[str, str, str], label: str) -> None:
    colour, marker, dashes = style
    axes.plot(
        values, figures, dashes, color=colour, marker=marker, markersize=6, linewidth=2, label=label or None, zorder=3
    )


def _sorted(pairs: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """One figure for each value: the largest."""
    most: dict[int, float] = {}
    for value, figure in sorted(pairs):
        most[value] = max(figure, most.get(value, 0.0))
    return list(most), list(most.values())


def _proportion(axes: Axes) -> None:
    """A broken line through the first series' last point: twice as much takes twice as long."""
    values, figures = axes.lines[0].get_data()
    last = float(figures[-1]) / float(values[-1])
    axes.plot(values, [last * v for v in values], "--", color=GREY, linewidth=1, label="in proportion", zorder=2)


def _finish(axes: Axes, label: str, what: str) -> None:
    """Both scales logarithmic, ticks where values are, at least a decade of figures."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    values = sorted({float(v) for line in axes.lines for v in line.get_data()[0]})
    drawn = [float(y) for line in axes.lines if line.get_label() != "in proportion" for y in line.get_data()[1]]
    low, high = min(drawn), max(drawn)
    widen = max(1.25, (10 * low / high) ** 0.5)
    axes.set_ylim(low / widen, high * widen * 1.5)  # room for the legend
    axes.set_xticks(values, [f"{v:,.0f}" for v in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_xlabel(label, color=INK, **words())
    axes.set_ylabel(what, color=INK, **words())
    tidy(axes)
    axes.grid(axis="x", color=FAINT, linewidth=0.9, zorder=0)
