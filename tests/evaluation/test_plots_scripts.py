"""Every plot draws the words of its data in whatever script they are, or says that no font can."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from opticnerve.common import drawing
from opticnerve.compare import plots as compare_plots
from opticnerve.compare.stats import Estimate
from opticnerve.interpret import plot as attribution_plot
from opticnerve.interpret.attribution import Attribution, Map, Word
from opticnerve.runs.card import plots
from opticnerve.ui.look import _draw

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import localization

WORDS = "写真の色は何ですか"
ESTIMATE = Estimate(0.5, 0.4, 0.6, 1, 10)
METRICS = [{"step": i, "loss": 1 / (i + 1), "learning_rate": {f"部分{WORDS}": 1e-3}} for i in range(4)]


def looked() -> Attribution:
    maps = [Map(method="relevance", grid_WHH=np.ones((2, 2, 2)), note=WORDS, on_picture=[0.5, 0.5])]
    return Attribution(
        answer=WORDS, words=[Word("赤", [1]), Word("色", [2])], log_p=[0.0, 0.0], maps=maps, box=(0, 0, 8, 8)
    )


def picture() -> PIL.Image.Image:
    return PIL.Image.new("RGB", (8, 8))


# Each public function that writes a picture, called with foreign words wherever it takes words.
PLOTS: dict[Callable[..., Any], Callable[[Path], Any]] = {
    plots.loss_plot: lambda p: plots.loss_plot(METRICS, p, title=WORDS),
    plots.image_dependence_plot: lambda p: plots.image_dependence_plot(
        {"n": 4, "real": 0.5, "blank": 0.2, "shuffled": 0.2}, p
    ),
    plots.samples_plot: lambda p: plots.samples_plot(
        [{"question": WORDS * 6, "prediction": WORDS * 5, "answer": WORDS, "right": r} for r in (True, False, None)],
        p, folder=p.parent, title=WORDS,
    ),
    attribution_plot.attribution_plot: lambda p: attribution_plot.attribution_plot(looked(), picture(), WORDS, p),
    localization.shares_plot: lambda p: localization.shares_plot(
        [{"model": WORDS, "method": "relevance", "mass": 0.3, "low": 0.2, "high": 0.4, "area": 0.1, "best": 0.9}], p,
        title=WORDS, note=WORDS,
    ),
    compare_plots.dots: lambda p: compare_plots.dots(
        {WORDS: {WORDS: ESTIMATE, "b": None}}, p, title=WORDS, note=WORDS, lines={WORDS: 0.5}, line_label=WORDS
    ),
    compare_plots.scatter: lambda p: compare_plots.scatter(
        {WORDS: (10.0, ESTIMATE), "b": (1000.0, ESTIMATE)}, p, title=WORDS, note=WORDS, x=WORDS, log=True
    ),
    compare_plots.bands: lambda p: compare_plots.bands(
        {WORDS: [([1, 2, 3], [3.0, 2.0, 1.0])]}, p, title=WORDS, note=WORDS, x=WORDS
    ),
    compare_plots.bars: lambda p: compare_plots.bars({WORDS: 2.0, "b": 1.0}, p, title=WORDS, note=WORDS, x=WORDS),
    _draw: lambda p: _draw(np.zeros((8, 8, 3), np.uint8), looked(), looked().maps[0], 0),
}  # fmt: skip


def test_every_plot_is_tried() -> None:
    known = {
        f for module in (plots, attribution_plot, compare_plots, localization) for name, f in vars(module).items()
        if inspect.isfunction(f) and f.__module__ == module.__name__ and "path" in inspect.signature(f).parameters
    }  # fmt: skip
    assert known == set(PLOTS) - {_draw}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fonts are looked for anew, and what was said is forgotten."""
    forget = drawing._others.cache_clear
    monkeypatch.setattr(drawing, "_warned", set())
    monkeypatch.setattr(drawing, "_packaged", lambda: None)
    forget()
    yield
    forget()


@pytest.fixture
def gothic(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A font with a square for each of the words' characters, and no other."""
    characters = sorted(set(WORDS + "部分赤色"))
    names = [".notdef", *(f"u{ord(c):X}" for c in characters)]
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (700, 700), (700, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"u{ord(c):X}" for c in characters})
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    file = tmp_path / "squares.ttf"
    builder.save(file)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    monkeypatch.setattr(drawing, "_packaged", lambda: str(file))
    return file


@pytest.mark.parametrize("plot", PLOTS.values(), ids=[f.__name__ for f in PLOTS])
def test_a_font_with_the_glyphs_is_taken(
    plot: Callable[[Path], Any], gothic: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        plot(tmp_path / "plot.png")
    assert caplog.records == []


@pytest.mark.parametrize("plot", PLOTS.values(), ids=[f.__name__ for f in PLOTS])
def test_without_such_a_font_it_is_said_once(
    plot: Callable[[Path], Any], fresh: None, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(drawing, "_others", list)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        plot(tmp_path / "plot.png")
        plot(tmp_path / "plot.png")
    told = [r.getMessage() for r in caplog.records]
    if plot is PLOTS[plots.image_dependence_plot]:  # it has no words of the data
        assert told == []
    else:
        assert len(told) == 1
        assert "opticnerve[fonts]" in told[0]


def test_matplotlibs_own_font_of_boxes_is_none(fresh: None) -> None:
    assert all("Last Resort" not in f.name for f in drawing._others())


@pytest.mark.parametrize(
    ("text", "width", "most", "lines"),
    [
        ("a red circle", 20, 2, ["a red circle"]),
        ("a red circle and a blue square", 12, 3, ["a red circle", "and a blue", "square"]),
        ("a red circle and a blue square", 12, 2, ["a red circle", "and a blue …"]),
        ("写真の色は何ですか", 8, 3, ["写真の色", "は何です", "か"]),
        ("写真の色は何ですか", 8, 2, ["写真の色", "は何で …"]),
        ("supercalifragilistic", 8, 3, ["supercal", "ifragili", "stic"]),
        ("", 8, 2, []),
    ],
)  # fmt: skip
def test_lines_are_as_wide_as_they_look(text: str, width: int, most: int, lines: list[str]) -> None:
    found = drawing.wrap(text, width, most).splitlines()
    assert found == lines
    assert all(drawing.columns(line) <= width for line in found)
