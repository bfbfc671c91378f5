"""How the house draws: figures, titles, axes and fonts of every plot.

Figures are made through matplotlib's object API, so that nothing of the caller's own plotting is touched. Colours are
Okabe and Ito's, which colour-blind readers can tell apart; colour is never the only sign.
"""

from __future__ import annotations

import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#8A8F98")
INK, FAINT = "#22262B", "#E4E6EA"
_DPI = 150


def smooth(values: np.ndarray) -> np.ndarray:
    """An exponential average over about a fiftieth of the steps, without the usual start at zero; NaNs are skipped."""
    keep = 1 - 1 / max(1.0, len(values) / 50)
    out, mean, weight = np.full(len(values), np.nan), 0.0, 0.0
    for i, v in enumerate(values):
        if np.isfinite(v):
            mean, weight = keep * mean + (1 - keep) * v, keep * weight + (1 - keep)
        out[i] = mean / weight if weight else np.nan
    return out


def figure_of(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def title_of(axes: Axes, title: str, note: str) -> None:
    axes.set_title(f"{title}\n", loc="left", fontsize=13, fontweight="bold", color=INK, **words())
    axes.annotate(
        note, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=9.5, color="#5A6069"
    )


def tidy(*many: Axes) -> None:
    for axes in many:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.grid(axis="y", color=FAINT, linewidth=0.9, zorder=0)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK)


def wrap(text: str, width: int, most_lines: int) -> str:
    return "\n".join(textwrap.wrap(" ".join(str(text).split()), width, max_lines=most_lines, placeholder=" …"))


@cache
def _fonts() -> tuple[str, ...]:
    """DejaVu Sans, then whatever fonts for East Asian scripts are installed: matplotlib warns of missing ones."""
    installed = {f.name for f in font_manager.fontManager.ttflist}
    others = ("Noto Sans CJK JP", "Noto Sans JP", "IPAexGothic", "Hiragino Sans", "Yu Gothic", "Noto Sans CJK SC")
    return ("DejaVu Sans", *(f for f in others if f in installed))


def words() -> dict[str, Any]:
    # Text from data may hold dollar signs, which are no formulas.
    return {"parse_math": False, "fontfamily": list(_fonts())}


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure.savefig(path, dpi=_DPI)
    return path
