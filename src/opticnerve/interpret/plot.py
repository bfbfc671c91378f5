"""Where a model looks, as a picture: one panel for each word of the answer, one row for each method.

Cells are drawn as what they are: no smoothing, for a map of 4 × 4 tokens knows nothing between them. The picture is
grey beneath the map, so that no colour of its own is taken for weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from opticnerve.common.drawing import GREY, INK, save, words, wrap
from opticnerve.interpret.attribution import Attribution, Map

MOST = 6  # words beside each other
_SIDE, _LEFT, _HEAD, _GAP = 2.3, 1.75, 0.8, 0.42  # inches


def attribution_plot(looked: Attribution, picture: PIL.Image.Image, question: str, path: Path) -> Path:
    """Write the PNG. The first column is the picture alone; long answers go on in further rows.

    Each panel has its own scale, from nothing to its highest cell, which is outlined and whose value stands above it.
    """
    lines = [range(s, min(s + MOST, len(looked.words))) for s in range(0, len(looked.words), MOST)]
    columns = 1 + max(map(len, lines))
    rows = len(lines) * len(looked.maps)
    width, height = _LEFT + columns * (_SIDE + 0.2), _HEAD + rows * (_SIDE + _GAP) + 0.1
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    title = {"fontsize": 13, "fontweight": "bold", "color": INK, "va": "top", **words()}
    characters = int(width * 9)
    figure.text(0.15 / width, 1 - 0.14 / height, wrap(question, characters, 1), **title)
    figure.text(
        0.15 / width, 1 - 0.44 / height, wrap(f"answer: {looked.answer}", characters, 1),
        **{**title, "fontsize": 11, "fontweight": "normal"},
    )  # fmt: skip
    shown = np.asarray(picture.convert("RGB"))
    row = 0
    for line in lines:
        for found in looked.maps:
            bottom = height - _HEAD - (row + 1) * (_SIDE + _GAP) + 0.1
            _method(figure, found, 0.15 / width, (bottom + _SIDE) / height)
            for column in range(1 + len(line)):
                left = _LEFT + column * (_SIDE + 0.2)
                axes = figure.add_axes((left / width, bottom / height, _SIDE / width, _SIDE / height))
                if column == 0:
                    _bare(axes, shown)
                else:
                    panel(axes, shown, looked, found, line[column - 1])
            row += 1
    return save(figure, path)


def _method(figure: Figure, found: Map, x: float, y: float) -> None:
    figure.text(x, y, found.method.replace("_", "-"), fontsize=11, fontweight="bold", color=INK, va="top", **words())
    size = figure.get_figheight()
    figure.text(x, y - 0.24 / size, wrap(found.note, 19, 8), fontsize=8.5, color="#5A6069", va="top", **words())


def _bare(axes: Axes, shown: NDArray[Any]) -> None:
    axes.imshow(shown, interpolation="nearest" if max(shown.shape) < 160 else "antialiased")
    _frame(axes)
    axes.set_title("the picture", fontsize=10, color="#5A6069", loc="left", pad=4)


def panel(axes: Axes, shown: NDArray[Any], looked: Attribution, found: Map, word: int) -> None:
    """One map over the grey picture; the word and the highest value stand above. `shown`: (height, width, 3)."""
    grid_HH = found.grid_WHH[word]
    left, top, right, bottom = looked.box
    grey_HW = shown @ np.array([0.299, 0.587, 0.114])
    axes.imshow(255 - (255 - grey_HW) * 0.75, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    highest = float(grid_HH.max())
    share_HH = np.clip(grid_HH, 0, None) / highest if highest > 0 else np.zeros_like(grid_HH)
    axes.imshow(
        share_HH, cmap="inferno_r", vmin=0, vmax=1.15, alpha=0.15 + 0.6 * share_HH, interpolation="nearest",
        extent=(left - 0.5, right - 0.5, bottom - 0.5, top - 0.5),
    )  # fmt: skip
    if highest > 0:
        x, y = found.peak(word)
        cell = (right - left) / grid_HH.shape[1], (bottom - top) / grid_HH.shape[0]
        corner = left + x * (right - left) - cell[0] / 2 - 0.5, top + y * (bottom - top) - cell[1] / 2 - 0.5
        axes.add_patch(Rectangle(corner, *cell, fill=False, edgecolor="#0072B2", linewidth=2))
    axes.set_xlim(-0.5, shown.shape[1] - 0.5)
    axes.set_ylim(shown.shape[0] - 0.5, -0.5)
    _frame(axes)
    axes.set_title(
        wrap(looked.words[word].text.replace("\n", "·"), 14, 1), loc="left", fontsize=11, color=INK, pad=4, **words()
    )
    axes.set_title(_highest(found, word), loc="right", fontsize=8.5, color="#5A6069", pad=4)


def _highest(found: Map, word: int) -> str:
    value = float(found.grid_WHH[word].max())
    if found.method == "occlusion":
        return f"highest {value:.2g} nats" if value > 0 else "no drop anywhere"
    return f"highest {value:.0%}"


def _frame(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=GREY, linewidth=0.8)


def shares_plot(rows: Sequence[dict[str, Any]], path: Path, *, title: str, note: str) -> Path:
    """Mean share of mass on the object with its interval, by method and model, and what chance would give.

    `rows`: `model`, `method`, `mass`, `low`, `high`, `area`, `best`.
    """
    figure = Figure(figsize=(8.4, 1.5 + 0.42 * len(rows)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = np.arange(len(rows))[::-1]
    axes.barh(places, [r["mass"] for r in rows], height=0.62, color="#0072B2", zorder=2)
    for y, r in zip(places, rows, strict=True):
        axes.plot([r["low"], r["high"]], [y, y], color=INK, linewidth=1.6, zorder=3)
        axes.text(r["high"] + 0.012, y, f"{r['mass']:.1%}", va="center", fontsize=9, color=INK)
        axes.plot([r["best"]] * 2, [y - 0.36, y + 0.36], color=GREY, linewidth=1.6, linestyle=":", zorder=3)
    axes.axvline(rows[0]["area"], color="#D55E00", linestyle="--", linewidth=1.6, zorder=3)
    axes.set_yticks(places, [f"{r['model']}: {r['method'].replace('_', '-')}" for r in rows], **words())
    axes.set_xlim(0, 1)
    axes.set_xlabel(
        "share of the map on the object\n(dashed: its share of the area; dotted: the most that this grid allows)"
    )
    axes.set_title(f"{title}\n{note}", loc="left", fontsize=10.5, color=INK, **words())
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, axis="y", length=0)
    return save(figure, path)
