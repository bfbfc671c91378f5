"""The run card's pictures: loss curves, image dependence, sample questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

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
    plain_text,
    save,
    smooth,
    tidy,
    title_of,
    wrap,
)
from opticnerve.data.media.open import open_image
from opticnerve.evaluation.metrics import wilson_interval
from opticnerve.runs.folder import finite
from opticnerve.types import DataError

_LINES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"))


def loss_plot(metrics: Sequence[dict[str, Any]], path: Path, *, title: str) -> Path:
    """Loss over steps, raw and smoothed, with the learning rates below; `metrics` as in metrics.jsonl."""
    steps = np.array([finite(m["step"]) for m in metrics])
    loss = np.array([finite(m.get("loss")) for m in metrics])
    figure = figure_of(8, 4.8)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.plot(steps, loss, color=BLUE, alpha=0.28, linewidth=1, label="each step")
    top.plot(steps, smooth(loss), color=BLUE, linewidth=2.2, label="smoothed")
    looks = [(finite(m["step"]), finite(m["validation"].get("loss"))) for m in metrics if m.get("validation")]
    if any(np.isfinite(held) for _, held in looks):
        top.plot(*zip(*looks, strict=True), color=ORANGE, linewidth=2, marker="o", markersize=4, label="held out")
    top.set_ylabel("loss (nats per trained token)")
    if np.isfinite(loss).any():
        # The first steps would squeeze the rest of the curve into a line at the bottom.
        usual = max([float(np.nanpercentile(loss, 99.5)), *(h for _, h in looks if np.isfinite(h))])
        top.set_ylim(0, max(usual, 1e-9) * 1.12)
    top.legend(frameon=False, loc="upper right")
    title_of(top, title, _speed(metrics, loss))

    given = [m.get("learning_rate") or {} for m in metrics]
    rates = {part: [finite(g.get(part)) for g in given] for part in dict.fromkeys(p for g in given for p in g)}
    for i, (part, values) in enumerate(rates.items()):
        colour, style = _LINES[i % len(_LINES)]
        bottom.plot(steps, values, color=colour, linestyle=style, linewidth=1.6, label=part)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.yaxis.set_major_locator(MaxNLocator(3))
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    bottom.set_ylim(bottom=0)
    if rates:
        # Room above the highest rate, so that the legend covers no line.
        bottom.set_ylim(top=bottom.get_ylim()[1] * 1.45)
        bottom.legend(frameon=False, loc="upper right", ncols=len(rates), fontsize=8.5)
    tidy(top, bottom)
    return save(figure, path)


def image_dependence_plot(dependence: dict[str, Any], path: Path) -> Path:
    """Three bars: accuracy with the real, a blank and a shuffled picture, with 95 % intervals."""
    n = int(dependence["n"])
    names = ("real", "blank", "shuffled")
    values = np.array([float(dependence[k]) for k in names])
    ends = np.array([wilson_interval(v * n, n) for v in values])
    figure = figure_of(6.4, 4.2)
    axes = figure.subplots()
    axes.bar(range(3), values, width=0.6, color=[BLUE, GREY, ORANGE], zorder=2)
    axes.errorbar(
        range(3), values, yerr=np.abs(ends.T - values), fmt="none", ecolor=INK, elinewidth=1.3, capsize=5, zorder=3
    )
    for x, (value, (_, high)) in enumerate(zip(values, ends, strict=True)):
        axes.text(x, high + 0.02, f"{value:.1%}", ha="center", va="bottom", fontsize=12, fontweight="bold", color=INK)
    axes.set_xticks(range(3), ["the real picture", "a blank picture", "another sample's\npicture"], fontsize=10.5)
    axes.set_ylim(0, 1.12)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("accuracy")
    title_of(axes, "Do the answers depend on the picture?", f"{n:,} questions each; whiskers are 95 % intervals")
    tidy(axes)
    axes.tick_params(axis="x", length=0)
    return save(figure, path)


def samples_plot(samples: Sequence[dict[str, Any]], path: Path, *, folder: Path, title: str, most: int = 12) -> Path:
    """A grid of pictures with question, prediction and reference, each marked right or wrong.

    `samples` as under "tasks" in results.json; `folder` is where relative picture paths start. A sample without "right"
    (a caption) gets no mark.
    """
    wrong = [s for s in samples if s.get("right") is False]
    others = [s for s in samples if s.get("right") is not False]
    half = min(len(wrong), max(most // 2, most - len(others)))
    shown = others[: most - half] + wrong[:half]
    columns = min(4, max(1, len(shown)))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.9 * columns, 3.9 * rows + 0.75), facecolor="white")
    FigureCanvasAgg(figure)
    height = figure.get_figheight()
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(left=0.02, right=0.98, top=1 - 0.75 / height, bottom=1.1 / height, hspace=0.48, wspace=0.14)
    figure.text(
        0.02, 1 - 0.2 / height, wrap(title, 30 * columns, 1), fontsize=13, fontweight="bold", va="top", **plain_text()
    )
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, sample in zip(grid.flat, shown, strict=False):
        _sample(axes, sample, folder)
    return save(figure, path)


def _sample(axes: Axes, sample: dict[str, Any], folder: Path) -> None:
    right = sample.get("right")
    colour, mark = {True: (GREEN, "✓"), False: (RED, "✗"), None: (GREY, "")}[right]
    _picture(axes, sample.get("image"), folder)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.5)
    if mark:
        axes.text(
            0.955, 0.955, mark, transform=axes.transAxes, ha="right", va="top", fontsize=15, fontweight="bold",
            color="white",
            bbox={"boxstyle": "round,pad=0.22", "facecolor": colour, "edgecolor": "white", "linewidth": 1.2},
        )  # fmt: skip
    lines = wrap(sample.get("question") or "(no question)", 33, 2)
    said = wrap(f"{mark} {sample.get('prediction') or '(nothing)'}".strip(), 29, 2)
    below = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top", "annotation_clip": False}
    y = -7.0
    for text, style in (
        (lines, {"color": INK}),
        (said, {"color": colour if right is not None else INK, "fontweight": "bold"}),
        (wrap(f"reference: {sample.get('answer')}", 36, 2), {"color": "#5A6069", "fontsize": 8.5}),
    ):
        axes.annotate(text, (0, 0), (0, y), **{"fontsize": 9.5, **plain_text(), **style, **below})
        y -= 13.5 * (text.count("\n") + 1) + 1.5


def _picture(axes: Axes, image: str | None, folder: Path) -> None:
    axes.set_box_aspect(1)
    try:
        if not image:
            raise DataError("no picture was kept", kind="no-image")
        picture = open_image(folder / image, where=str(image))
    except DataError:
        # The card reports on a run: a picture that has been moved since is worth a note, not a crash.
        axes.set_facecolor(FAINT)
        axes.text(0.5, 0.5, "picture not\nfound", transform=axes.transAxes, ha="center", va="center", color="#5A6069")
        return
    axes.set_facecolor("white")
    axes.imshow(picture, interpolation="nearest" if max(picture.size) < 160 else "antialiased")
    axes.set_aspect("equal", adjustable="datalim" if picture.width != picture.height else "box")


def _speed(metrics: Sequence[dict[str, Any]], loss: np.ndarray) -> str:
    notes = [f"{len(metrics):,} steps"]
    speeds = [s for m in metrics if np.isfinite(s := finite(m.get("tokens_per_second")))]
    if speeds:
        notes.append(f"{np.median(speeds):,.0f} tokens/s (median)")
    if np.isfinite(loss).any():
        notes.append(f"smoothed loss at the end {smooth(loss)[-1]:.3g}")
    if not np.isfinite(loss).all():
        notes.append("NOT FINITE at some steps")
    return "; ".join(notes)
