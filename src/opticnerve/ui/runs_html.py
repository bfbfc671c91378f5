"""Pieces of the tabs for runs and training as HTML (`runs.html`), the drawing (SVG) of a stage's loss among them.

Every text from a run is escaped; drawings follow the page's colours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.ticker import MaxNLocator

from opticnerve.common.drawing import smooth
from opticnerve.common.markdown import percent
from opticnerve.runs.card.warnings import warnings_of
from opticnerve.runs.folder import finite
from opticnerve.types import OpticNerveError
from opticnerve.ui.runs import ShownRun, ShownStage, dicts
from opticnerve.ui.runs_content import RunAnswer, thumbnail

Words = Callable[..., str]  # a text of the page, by its key: `Translations`
MOST_ROWS = 200
STYLE = Path(__file__).with_name("runs.css").read_text(encoding="utf-8")
HTML: Any = (
    jinja2.Environment(autoescape=True).from_string(Path(__file__).with_name("runs.html").read_text("utf-8")).module
)


def summary(run: ShownRun, words: Words) -> str:
    """A run's state, stages, headline figures, warnings, and what could not be read."""
    stages = [(s.name, progress(s, words), _stage_state(run, s, words)) for s in run.stages]
    warnings, unread = [], run.notes
    try:
        warnings = list(warnings_of(run.results))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        unread = [f"results.json: its warnings cannot be told, for an entry has an unknown form ({e!r})", *unread]
    return str(HTML.summary(run, stages, _figures(run, words), warnings, unread, words))


def _stage_state(run: ShownRun, stage: ShownStage, words: Words) -> str:
    if stage.finished:
        return words("runs_finished")
    return words("runs_running") if run.state == "running" and stage.steps else "–"


def progress(stage: ShownStage, words: Words) -> str:
    """`120 of 420`."""
    done = stage.planned if stage.finished and stage.planned is not None else stage.steps
    if stage.planned is None:
        return words("runs_steps_open", done=f"{done:,}")
    return words("runs_steps", done=f"{done:,}", planned=f"{stage.planned:,}")


def runs_table(runs: Sequence[ShownRun], words: Words) -> str:
    """One row a run."""
    rows = [
        (
            run.name, words(f"runs_{run.state}"), headline(run) or "–",
            f"{100 * gap:+.1f}" if math.isfinite(gap := _gap(run)) else "–", when(run.written),
        )
        for run in runs[:MOST_ROWS]
    ]  # fmt: skip
    return str(HTML.table([words(f"runs_{k}") for k in ("run", "state", "score", "gap", "written")], rows))


def headline(run: ShownRun) -> str:
    """The first task's score: `95.1%`; empty where there is none."""
    scores = [s for t in run.tasks if math.isfinite(s := finite(t.get("accuracy")))]
    return percent(scores[0]) if scores else ""


def curves(run: ShownRun, words: Words) -> str:
    """The loss of every stage that has begun."""
    drawn = [curve_figure(s, words) for s in run.stages if s.metrics]
    return "".join(drawn) or str(HTML.paragraph(words("runs_no_curves")))


def curve_figure(stage: ShownStage, words: Words, planned: int | None = None) -> str:
    """A stage's loss with a line of words that says the same; `planned`: its steps, if more is known than it says."""
    curve, said = curve_of(stage.metrics), ""
    if known := curve.known:
        first, last = f"{known[0]:.3g}", f"{known[-1]:.3g}"
        said = words("runs_curve_said", stage=stage.name, first=first, last=last, steps=f"{stage.steps:,}")
        if curve.held_out:
            step, held = curve.held_out[-1]
            said += f" {words('runs_curve_held', held=f'{held:.3g}', step=f'{step:,}')}"
    drawn = curve_svg(curve, title=said, x_label=words("runs_step"), planned=planned or stage.planned)
    return str(HTML.curve(stage.name, drawn, f"{said} {speed(stage, words)}", words))


def speed(stage: ShownStage, words: Words) -> str:
    tokens = pace(stage.metrics)[1]
    return words("runs_curve_pace", tokens=f"{tokens:,.0f}") if math.isfinite(tokens) else ""


def answers_grid(run: ShownRun, shown: Sequence[RunAnswer], words: Words) -> str:
    """Answers as cards, each with its picture, if it has one."""
    cards = []
    for answer in shown:
        picture, why = "", words("runs_no_picture")
        if answer.image:
            try:
                picture = thumbnail(run, answer.image)
            except OpticNerveError as e:
                why = str(e)
        cards.append((answer, picture, why))
    return str(HTML.answers(cards, words) if cards else HTML.paragraph(words("runs_none_shown")))


def span(seconds: float, words: Words) -> str:
    """`42 s`, `6 min 10 s`, `3 h 5 min`, in the page's language."""
    whole = round(seconds)
    if whole < 60:
        return words("runs_seconds", s=whole)
    if whole < 3600:
        return words("runs_minutes", m=whole // 60, s=whole % 60)
    return words("runs_hours", h=whole // 3600, m=whole % 3600 // 60)


def when(written: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(written))


def _figures(run: ShownRun, words: Words) -> list[tuple[str, str, str]]:
    """(label, figure, a smaller remark) of each."""
    found = []
    for task in run.tasks:
        if math.isfinite(score := finite(task.get("accuracy"))):
            ends = task.get("ci95")
            low, high = (
                percent(finite(v)) for v in (ends if isinstance(ends, list) and len(ends) == 2 else (None, None))
            )
            text = words("runs_score_n", n=f"{finite(task.get('n')):,.0f}", low=low, high=high)
            found.append((f"{words('runs_score')}: {task.get('name')}", percent(score), text))
    dependence = run.results.get("image_dependence")
    if isinstance(dependence, dict) and math.isfinite(gap := _gap(run)):
        shares = {k: percent(finite(dependence.get(k))) for k in ("real", "blank")}
        text = words("runs_gap_n", n=f"{finite(dependence.get('n')):,.0f}", **shares)
        found.append((words("runs_gap"), f"{100 * gap:+.1f}", text))
    kept = [p for f in dicts(run.results.get("forgetting")) if math.isfinite(p := finite(f.get("perplexity")))]
    if kept:
        both = " → ".join(f"{p:.2f}" for p in dict.fromkeys((kept[0], kept[-1])))
        found.append((words("runs_perplexity"), both, ""))
    seconds = run.results.get("seconds")
    if isinstance(seconds, dict) and math.isfinite(total := finite(seconds.get("total"))):
        found.append((words("runs_time"), span(total, words), ""))
    if math.isfinite(peak := finite(run.results.get("peak_memory_bytes"))):
        found.append((words("runs_memory"), f"{peak / 2**30:.2f} GiB", ""))
    return [*found, (words("runs_written"), "", when(run.written))]


def _gap(run: ShownRun) -> float:
    found = run.results.get("image_dependence")
    return finite(found.get("real")) - finite(found.get("blank")) if isinstance(found, dict) else math.nan


# -- the curve ------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 640, 270
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 12, 56
MOST_POINTS = 400
LAST = 50
"""Steps over which the present speed is taken."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Thinned to at most `MOST_POINTS` steps; a step without a number holds NaN. `smooth` is taken over all steps.
    `held_out`: the steps whose held-out loss was looked at, with it."""

    steps: list[int]
    loss: list[float]
    smooth: list[float]
    held_out: list[tuple[int, float]] = field(default_factory=list)

    @property
    def known(self) -> list[float]:
        return [v for v in self.smooth if math.isfinite(v)]


def curve_of(metrics: Sequence[dict[str, Any]]) -> Curve:
    """The curve of the lines of metrics.jsonl."""
    loss = np.array([finite(m.get("loss")) for m in metrics])
    even = smooth(loss)
    # The last step is always among them: it is what the words beside the curve tell.
    count = min(len(metrics), MOST_POINTS)
    kept = [int(i) for i in np.linspace(0, len(metrics) - 1, count)] if metrics else []
    looks = [(int(m["step"]), m["validation"]) for m in metrics if isinstance(m.get("validation"), dict)]
    return Curve(
        [int(metrics[i]["step"]) for i in kept], [float(loss[i]) for i in kept], [float(even[i]) for i in kept],
        [(step, held) for step, look in looks if np.isfinite(held := finite(look.get("loss")))],
    )  # fmt: skip


def pace(metrics: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Seconds a step and tokens a second, over the last steps; NaN where two steps with times are not there."""
    last = [m for m in metrics[-LAST:] if np.isfinite(finite(m.get("elapsed_s")))]
    if len(last) < 2:
        return np.nan, np.nan
    seconds = finite(last[-1]["elapsed_s"]) - finite(last[0]["elapsed_s"])
    if seconds <= 0:
        return np.nan, np.nan
    tokens = sum(t for m in last[1:] if np.isfinite(t := finite(m.get("tokens"))))
    return seconds / (int(last[-1]["step"]) - int(last[0]["step"])), tokens / seconds


def curve_svg(curve: Curve, *, title: str, x_label: str, planned: int | None = None) -> Any:
    """The drawing; `title` is what a screen reader says of it. The axis runs to the `planned` steps, if they are known.

    Values far above the usual ones, as first steps have, leave the drawing at its top.
    """
    text = [v for v in (*curve.loss, *curve.smooth, *(h for _, h in curve.held_out)) if np.isfinite(v)]
    if not text:
        return ""
    top = max(float(np.percentile(text, 99)) * 1.08, 1e-9)
    end = max(planned or 0, curve.steps[-1], 2)

    def x(step: float) -> float:
        return round(LEFT + (step - 1) / (end - 1) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - min(max(value / top, 0.0), 1.0) * (HEIGHT - TOP - BOTTOM), 1)

    grid = [(y(value), f"{value:g}") for value in _ticks(0, top)]
    ticks = [(x(step), f"{step:,.0f}") for step in _ticks(1, end) if step == round(step)]
    lines = [
        (kind, " ".join(f"{x(step)},{y(value)}" for step, value in piece))
        for kind, values in (("raw", curve.loss), ("smooth", curve.smooth))
        for piece in _pieces(curve.steps, values)
    ]
    if curve.held_out:
        lines.append(("held", " ".join(f"{x(step)},{y(value)}" for step, value in curve.held_out)))
    return HTML.drawing(WIDTH, HEIGHT, title, x_label, LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, grid, ticks, lines)


def _ticks(low: float, high: float) -> list[float]:
    return [float(v) for v in MaxNLocator(5).tick_values(low, high) if low <= v <= high]


def _pieces(steps: list[int], values: list[float]) -> list[list[tuple[float, float]]]:
    """Runs of steps that have a number: a line does not bridge those that have none."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for step, value in zip(steps, values, strict=True):
        if np.isfinite(value):
            pieces[-1].append((step, value))
        elif pieces[-1]:
            pieces.append([])
    return [p for p in pieces if p]
