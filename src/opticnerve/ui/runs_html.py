"""Pieces of the tabs for runs and training as HTML, the drawing (SVG) of a stage's loss among them.

Every text from a run is escaped; drawings follow the page's colours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from opticnerve.common.drawing import smooth
from opticnerve.common.markdown import percent
from opticnerve.runs.card.warnings import warnings_of
from opticnerve.runs.folder import finite
from opticnerve.types import OpticNerveError
from opticnerve.ui.runs import Run, Stage, dicts
from opticnerve.ui.runs_content import Answer, thumbnail

Words = Callable[..., str]  # a text of the page, by its key: `Translations`
MOST_ROWS = 200
STYLE = Path(__file__).with_name("runs.css").read_text(encoding="utf-8")


def summary(run: Run, words: Words) -> str:
    """A run's state, stages, headline figures, warnings, and what could not be read."""
    figures = "".join(f"<div><dt>{escape(k)}</dt><dd>{v}</dd></div>" for k, v in _figures(run, words))
    return (
        f'<h2>{escape(run.name)} <span class="state">{escape(words(f"runs_{run.state}"))}</span></h2>'
        f"{stages_table(run, words)}"
        f'<dl class="figures">{figures}</dl>{_warnings(run, words)}{notes(run.notes, words)}'
    )


def stages_table(run: Run, words: Words) -> str:
    rows = [[escape(s.name), progress(s, words), escape(_stage_state(run, s, words))] for s in run.stages]
    return _table([words("runs_stage"), words("runs_progress"), words("runs_state")], rows)


def progress(stage: Stage, words: Words) -> str:
    """`120 of 420`."""
    done = stage.planned if stage.finished and stage.planned is not None else stage.steps
    if stage.planned is None:
        return words("runs_steps_open", done=f"{done:,}")
    return words("runs_steps", done=f"{done:,}", planned=f"{stage.planned:,}")


def runs_table(runs: Sequence[Run], words: Words) -> str:
    """One row a run."""
    rows = []
    for run in runs[:MOST_ROWS]:
        gap = _gap(run)
        rows.append([
            escape(run.name), escape(words(f"runs_{run.state}")), headline(run) or "–",
            f"{100 * gap:+.1f}" if math.isfinite(gap) else "–", when(run.written),
        ])  # fmt: skip
    head = ["run", "state", "score", "gap", "written"]
    return _table([words(f"runs_{k}") for k in head], rows)


def headline(run: Run) -> str:
    """The first task's score: `95.1%`; empty where there is none."""
    scores = [s for t in run.tasks if math.isfinite(s := finite(t.get("accuracy")))]
    return percent(scores[0]) if scores else ""


def curves(run: Run, words: Words) -> str:
    """The loss of every stage that has begun."""
    drawn = [curve_figure(s, words) for s in run.stages if s.metrics]
    return "".join(drawn) or f"<p>{escape(words('runs_no_curves'))}</p>"


def curve_figure(stage: Stage, words: Words, planned: int | None = None) -> str:
    """A stage's loss with a line of words that says the same; `planned`: its steps, if more is known than it says."""
    curve = curve_of(stage.metrics)
    known = [v for v in curve.smooth if math.isfinite(v)]
    said = ""
    if known:
        said = words(
            "runs_curve_said", stage=stage.name, first=f"{known[0]:.3g}", last=f"{known[-1]:.3g}",
            steps=f"{stage.steps:,}",
        )  # fmt: skip
    tokens = pace(stage.metrics)[1]
    speed = f" {words('runs_curve_pace', tokens=f'{tokens:,.0f}')}" if math.isfinite(tokens) else ""
    drawing = curve_svg(curve, title=said, x_label=words("runs_step"), planned=planned or stage.planned)
    return (
        f"<figure><figcaption><strong>{escape(stage.name)}</strong> · {escape(words('runs_loss'))}</figcaption>"
        f"{drawing}<p>{escape(said + speed)}</p></figure>"
    )


def answers_grid(run: Run, shown: Sequence[Answer], words: Words) -> str:
    """Answers as cards, each with its picture, if it has one."""
    if not shown:
        return f"<p>{escape(words('runs_none_shown'))}</p>"
    return f'<ul class="answers">{"".join(_card(run, a, words) for a in shown)}</ul>'


def _card(run: Run, answer: Answer, words: Words) -> str:
    mark, kind = ("✗", "wrong") if answer.wrong else ("✓", "right")
    if answer.right is None:
        mark, kind = "", "unjudged"
    picture = f'<div class="gone">{escape(words("runs_no_picture"))}</div>'
    if answer.image:
        try:
            said = words("runs_picture_of", question=answer.question)
            picture = f'<img src="{thumbnail(run, answer.image)}" alt="{escape(said)}">'
        except OpticNerveError as e:
            picture = f'<div class="gone">{escape(str(e))}</div>'
    lines = "".join(
        f"<div>{escape(words(key))}: <strong>{escape(text or '–')}</strong></div>"
        for key, text in (("runs_said", answer.answer), ("runs_truth", answer.truth))
    )
    return (
        f'<li class="answer {kind}">{picture}<div><div>{escape(answer.question)}</div>{lines}'
        f'<div class="mark">{mark} {escape(words(f"runs_{kind}"))}</div></div></li>'
    )


def notes(told: Sequence[str], words: Words) -> str:
    if not told:
        return ""
    items = "".join(f"<li>{escape(n[:500])}</li>" for n in told)
    return f'<div class="warning"><strong>{escape(words("runs_notes"))}</strong><ul>{items}</ul></div>'


def span(seconds: float, words: Words) -> str:
    """`42 s`, `6 min 10 s`, `3 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return words("runs_seconds", s=whole)
    if whole < 3600:
        return words("runs_minutes", m=whole // 60, s=whole % 60)
    return words("runs_hours", h=whole // 3600, m=whole % 3600 // 60)


def when(written: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(written))


def _figures(run: Run, words: Words) -> list[tuple[str, str]]:
    found = []
    for task in run.tasks:
        if math.isfinite(score := finite(task.get("accuracy"))):
            low, high = (percent(finite(v)) for v in _pair(task.get("ci95")))
            told = words("runs_score_n", n=f"{finite(task.get('n')):,.0f}", low=low, high=high)
            found.append((f"{words('runs_score')}: {task.get('name')}", f"{percent(score)}<small>{told}</small>"))
    dependence = run.results.get("image_dependence")
    if isinstance(dependence, dict) and math.isfinite(gap := _gap(run)):
        shares = {k: percent(finite(dependence.get(k))) for k in ("real", "blank")}
        told = words("runs_gap_n", n=f"{finite(dependence.get('n')):,.0f}", **shares)
        found.append((words("runs_gap"), f"{100 * gap:+.1f}<small>{told}</small>"))
    kept = [p for f in dicts(run.results.get("forgetting")) if math.isfinite(p := finite(f.get("perplexity")))]
    if kept:
        found.append((words("runs_perplexity"), " → ".join(f"{p:.2f}" for p in dict.fromkeys((kept[0], kept[-1])))))
    seconds = run.results.get("seconds")
    if isinstance(seconds, dict) and math.isfinite(total := finite(seconds.get("total"))):
        found.append((words("runs_time"), escape(span(total, words))))
    if math.isfinite(peak := finite(run.results.get("peak_memory_bytes"))):
        found.append((words("runs_memory"), f"{peak / 2**30:.2f} GiB"))
    return [*found, (words("runs_written"), f"<small>{when(run.written)}</small>")]


def _pair(value: Any) -> tuple[Any, Any]:
    return (value[0], value[1]) if isinstance(value, list) and len(value) == 2 else (None, None)


def _gap(run: Run) -> float:
    found = run.results.get("image_dependence")
    return finite(found.get("real")) - finite(found.get("blank")) if isinstance(found, dict) else math.nan


def _warnings(run: Run, words: Words) -> str:
    try:
        told = warnings_of(run.results)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        return notes([f"results.json: its warnings cannot be told, for an entry has an unknown form ({e!r})"], words)
    return "".join(
        f'<div class="warning"><strong>⚠ {escape(title)}</strong><p>{escape(text)}</p></div>' for title, text in told
    )


def _stage_state(run: Run, stage: Stage, words: Words) -> str:
    if stage.finished:
        return words("runs_finished")
    return words("runs_running") if run.state == "running" and stage.steps else "–"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    body = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in rows)
    inner = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide" role="group" tabindex="0"><table>{inner}</table></div>'


# -- the curve ------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT = 640, 270
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 12, 56
MOST_POINTS = 400
LAST = 50
"""Steps over which the present speed is taken."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Thinned to at most `MOST_POINTS` steps; a step without a number holds NaN. `smooth` is taken over all steps."""

    steps: list[int]
    loss: list[float]
    smooth: list[float]


def curve_of(metrics: Sequence[dict[str, Any]]) -> Curve:
    """The curve of the lines of metrics.jsonl."""
    loss = np.array([finite(m.get("loss")) for m in metrics])
    even = smooth(loss)
    # The last step is always among them: it is what the words beside the curve tell.
    count = min(len(metrics), MOST_POINTS)
    kept = [int(i) for i in np.linspace(0, len(metrics) - 1, count)] if metrics else []
    return Curve(
        [int(metrics[i]["step"]) for i in kept], [float(loss[i]) for i in kept], [float(even[i]) for i in kept]
    )


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


def curve_svg(curve: Curve, *, title: str, x_label: str, planned: int | None = None) -> str:
    """The drawing; `title` is what a screen reader says of it. The axis runs to the `planned` steps, if they are known.

    Values far above the usual ones, as first steps have, leave the drawing at its top.
    """
    told = [v for v in (*curve.loss, *curve.smooth) if np.isfinite(v)]
    if not told:
        return ""
    top = max(float(np.percentile(told, 99)) * 1.08, 1e-9)
    end = max(planned or 0, curve.steps[-1], 2)

    def place(step: float, value: float) -> str:
        x = LEFT + (step - 1) / (end - 1) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - min(max(value / top, 0.0), 1.0) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    lines = []
    for value in _ticks(0, top):
        x, y = place(1, value).split(",")
        lines.append(f'<line class="grid" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for step in _ticks(1, end):
        if step >= 1 and step == round(step):
            x = place(step, 0).split(",")[0]
            lines.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 21}" text-anchor="middle">{step:,.0f}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    lines.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    for kind, values in (("raw", curve.loss), ("smooth", curve.smooth)):
        for piece in _pieces(curve.steps, values):
            lines.append(f'<polyline class="{kind}" points="{" ".join(place(*point) for point in piece)}"/>')
    return (
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(lines)}</svg>"
    )


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
