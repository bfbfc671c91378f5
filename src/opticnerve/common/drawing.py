"""How the house draws: figures, titles, axes and fonts of every plot.

Figures are made through matplotlib's object API, so that nothing of the caller's own plotting is touched. Colours are
Okabe and Ito's, which colour-blind readers can tell apart; colour is never the only sign.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from opticnerve.common import atomic

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#8A8F98")
INK, FAINT = "#22262B", "#E4E6EA"
_DPI = 150
_log = logging.getLogger(__name__)


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
    axes.set_title(f"{title}\n", loc="left", fontsize=13, fontweight="bold", color=INK, **plain_text())
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
    """Lines of `width` columns, of which a character of East Asian scripts takes two; what is left over becomes "…"."""
    lines = [""]
    for word in re.findall(r"\s+|[^\s\u2E80-\uFFEF]+|\S", " ".join(str(text).split())):
        while columns(word) > width:  # a name without a break
            cut = next(n for n in range(len(word), 0, -1) if columns(word[:n]) <= width or n == 1)
            if lines[-1]:
                lines.append("")
            lines[-1], word = word[:cut], word[cut:]
            lines.append("")
        if columns(lines[-1] + word) > width:
            lines.append("")
        lines[-1] += word if lines[-1] else word.lstrip()
    lines = [line.rstrip() for line in lines if line.strip()]
    if len(lines) <= most_lines:
        return "\n".join(lines)
    last = lines[most_lines - 1]
    while last and columns(f"{last} …") > width:
        last = last[:-1].rstrip()
    return "\n".join([*lines[: most_lines - 1], f"{last} …"])


def columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


# Fonts for East Asian scripts, first those with Japanese forms of characters; any other that has the glyphs will do.
_PREFERRED = (
    "Noto Sans CJK JP", "Noto Sans JP", "Source Han Sans JP", "IPAexGothic", "IPAGothic", "TakaoPGothic", "TakaoGothic",
    "Hiragino Sans", "Hiragino Maru Gothic Pro", "Yu Gothic", "Meiryo", "MS Gothic", "Noto Sans CJK SC", "Noto Sans SC",
)  # fmt: skip
_OURS = "DejaVu Sans"


@cache
def _glyphs(file: str) -> frozenset[int]:
    """The characters that a font has forms for."""
    try:
        return frozenset(font_manager.get_font(file).get_charmap())
    except (OSError, RuntimeError):  # bitmaps of emoji, damaged files
        return frozenset()


@cache
def _others() -> list[font_manager.FontEntry]:
    """All fonts but matplotlib's own (one of which has a box for every character), the best first."""
    found = [f for f in font_manager.fontManager.ttflist if not Path(f.fname).is_relative_to(mpl.get_data_path())]
    if packaged := _packaged():
        font_manager.fontManager.addfont(packaged)
        found.append(font_manager.fontManager.ttflist[-1])
    places = {name: place for place, name in enumerate(_PREFERRED)}
    return sorted(found, key=lambda f: (places.get(f.name, len(places)), f.style != "normal", f.name))


def _packaged() -> str | None:
    """IPAexGothic in the package japanize-matplotlib, of which nothing is imported."""
    try:
        files = importlib.metadata.files("japanize-matplotlib") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(f.locate()) for f in files if f.name == "ipaexg.ttf" and Path(str(f.locate())).is_file()), None)


def fonts_for(text: str) -> tuple[list[font_manager.FontEntry], str]:
    """Fonts for what DejaVu Sans lacks of `text`, each for what those before it lack; and what none of them has."""
    own = _glyphs(font_manager.findfont(_OURS))
    missing, fonts = {c for c in text if c.isprintable() and not c.isspace() and ord(c) not in own}, []
    for font in _others() if missing else []:
        if found := {c for c in missing if ord(c) in _glyphs(font.fname)}:
            fonts.append(font)
            missing -= found
        if not missing:
            break
    return fonts, "".join(sorted(missing))


_warned: set[str] = set()


def _has_weight(family: str, weight: str | int) -> bool:
    number: dict[Any, Any] = font_manager.weight_dict
    same = [f for f in font_manager.fontManager.ttflist if f.name == family]
    return any(number.get(f.weight, f.weight) == number.get(weight, weight) for f in same)


def visible(text: str) -> str:
    """Without control characters and the like, for which no font has a form."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)


@contextmanager
def dressed(figure: Figure) -> Iterator[None]:
    """Draw a figure whose every text has fonts with its glyphs. What no font has is drawn as boxes, and said once."""
    for axes in figure.axes:
        axes.get_xticklabels()  # makes them
        axes.get_yticklabels()
    missing = ""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if (shown := visible(text.get_text())) != text.get_text():
            text.set_text(shown)
        fonts, lacking = fonts_for(text.get_text())
        missing += lacking
        text.set_fontfamily([_OURS, *(f.name for f in fonts)])
        if fonts and not all(_has_weight(f.name, text.get_fontweight()) for f in fonts):
            text.set_fontweight("normal")  # few fonts of so many characters are bold, too, and matplotlib tells of it
    if new := "".join(sorted({*missing} - _warned)):
        _warned.update(new)
        _log.warning(
            "no font here has the characters %s of a plot, which are drawn as boxes; for Japanese `pip install "
            "'opticnerve[fonts]'`, for other scripts install Noto's fonts (Debian: fonts-noto-cjk)",
            new[:20] + "…" * (len(new) > 20),
        )
    with warnings.catch_warnings():
        if missing:  # matplotlib would say it once for each character and each time it is measured
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        yield


def plain_text() -> dict[str, Any]:
    return {"parse_math": False}  # text from data may hold dollar signs, which are no formulas


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with dressed(figure), atomic.replacing(path) as partial:
        figure.savefig(partial, dpi=_DPI, format="png")
    return path
