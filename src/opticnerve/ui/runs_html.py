"""Pieces of the tabs for runs and training as HTML. Every text from a run is escaped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from opticnerve.common.markdown import percent
from opticnerve.runs.card.warnings import warnings_of
from opticnerve.runs.folder import finite
from opticnerve.types import OpticNerveError
from opticnerve.ui.curve import curve_of, curve_svg, pace
from opticnerve.ui.runs import Run, Stage, dicts
from opticnerve.ui.runs_answers import Answer, thumbnail

Translations = Callable[..., str]
MOST_ROWS = 200

STYLE = """
p, li, dd, dt, td, th, figcaption { color: var(--body-text-color); overflow-wrap: anywhere; }
h1 { font-size: 1.4em; margin: 0.6em 0; } h2 { font-size: 1.2em; margin: 1em 0 0.4em; } h3 { margin: 0.8em 0 0.3em; }
ul { list-style: disc; padding-left: 1.4em; } blockquote { border-left: 4px solid #D55E00; padding-left: 0.8em; }
pre { overflow-x: auto; padding: 0.6em; background: var(--background-fill-secondary); font-size: 0.85em; }
pre.log { white-space: pre; overflow-wrap: normal; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; border: 0; } tr { border: 0; }
td, th { padding: 0.25em 0.9em 0.25em 0; text-align: left; vertical-align: top; border: 0;
  border-bottom: 1px solid var(--border-color-primary); }
img.plot { max-width: 100%; height: auto; background: white; border-radius: 4px; }
svg.curve { width: 100%; height: auto; max-width: 56em; }
svg.curve text { fill: var(--body-text-color); font-size: 13px; } svg.curve polyline { fill: none; }
svg.curve .grid { stroke: var(--border-color-primary); }
svg.curve .raw { stroke: #0072B2; stroke-width: 1; opacity: 0.4; }
svg.curve .smooth { stroke: #0072B2; stroke-width: 2.5; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(10em, 1fr)); gap: 0.6em; margin: 0.6em 0; }
.figures div, .answer { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 0.5em 0.7em; }
.figures dt { font-size: 0.85em; } .figures dd { margin: 0; font-weight: 600; font-size: 1.1em; }
.figures dd small { display: block; font-weight: 400; font-size: 0.75em; }
.state { font-weight: 600; border: 1px solid currentColor; border-radius: 1em; padding: 0.05em 0.7em; }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(13em, 1fr)); gap: 0.7em; padding: 0;
  list-style: none; }
.answer { border-left-width: 5px; margin: 0; } .answer.right { border-left-color: #009E73; }
.answer.wrong { border-left-color: #D55E00; }
.answer img { display: block; max-width: 100%; height: 9em; object-fit: contain; margin: 0 auto 0.4em; }
.answer .mark { font-weight: 600; } .answer .gone { text-align: center; opacity: 0.75; }
.warning { border-left: 4px solid #D55E00; padding: 0.3em 0.8em; margin: 0.5em 0; }
progress { width: 100%; max-width: 56em; height: 0.8em; accent-color: #0072B2; }
@media (max-width: 600px) {
  svg.curve text { font-size: 22px; }
  .answer { display: grid; grid-template-columns: 6.5em 1fr; gap: 0.7em; }
  .answer img { height: auto; max-height: 6.5em; margin: 0; }
}
"""


def summary(run: Run, words: Translations) -> str:
    """A run's state, stages, headline figures, warnings, and what could not be read."""
    figures = "".join(f"<div><dt>{escape(k)}</dt><dd>{v}</dd></div>" for k, v in _figures(run, words))
    return (
        f'<h2>{escape(run.name)} <span class="state">{escape(words(f"runs_{run.state}"))}</span></h2>'
        f"{stages_table(run, words)}"
        f'<dl class="figures">{figures}</dl>{_warnings(run, words)}{notes(run.notes, words)}'
    )


def stages_table(run: Run, words: Translations) -> str:
    rows = [[escape(s.name), progress(s, words), escape(_stage_state(run, s, words))] for s in run.stages]
    return _table([words("runs_stage"), words("runs_progress"), words("runs_state")], rows)


def progress(stage: Stage, words: Translations) -> str:
    """`120 of 420`."""
    done = stage.planned if stage.finished and stage.planned is not None else stage.steps
    if stage.planned is None:
        return words("runs_steps_open", done=f"{done:,}")
    return words("runs_steps", done=f"{done:,}", planned=f"{stage.planned:,}")


def runs_table(runs: Sequence[Run], words: Translations) -> str:
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


def curves(run: Run, words: Translations) -> str:
    """The loss of every stage that has begun."""
    drawn = [curve_figure(s, words) for s in run.stages if s.metrics]
    return "".join(drawn) or f"<p>{escape(words('runs_no_curves'))}</p>"


def curve_figure(stage: Stage, words: Translations, planned: int | None = None) -> str:
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


def answers_grid(run: Run, shown: Sequence[Answer], words: Translations) -> str:
    """Answers as cards, each with its picture, if it has one."""
    if not shown:
        return f"<p>{escape(words('runs_none_shown'))}</p>"
    return f'<ul class="answers">{"".join(_card(run, a, words) for a in shown)}</ul>'


def _card(run: Run, answer: Answer, words: Translations) -> str:
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


def notes(told: Sequence[str], words: Translations) -> str:
    if not told:
        return ""
    items = "".join(f"<li>{escape(n[:500])}</li>" for n in told)
    return f'<div class="warning"><strong>{escape(words("runs_notes"))}</strong><ul>{items}</ul></div>'


def span(seconds: float, words: Translations) -> str:
    """`42 s`, `6 min 10 s`, `3 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return words("runs_seconds", s=whole)
    if whole < 3600:
        return words("runs_minutes", m=whole // 60, s=whole % 60)
    return words("runs_hours", h=whole // 3600, m=whole % 3600 // 60)


def when(written: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(written))


def _figures(run: Run, words: Translations) -> list[tuple[str, str]]:
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


def _warnings(run: Run, words: Translations) -> str:
    try:
        told = warnings_of(run.results)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        return notes([f"results.json: its warnings cannot be told, for an entry has an unknown form ({e!r})"], words)
    return "".join(
        f'<div class="warning"><strong>⚠ {escape(title)}</strong><p>{escape(text)}</p></div>' for title, text in told
    )


def _stage_state(run: Run, stage: Stage, words: Translations) -> str:
    if stage.finished:
        return words("runs_finished")
    return words("runs_running") if run.state == "running" and stage.steps else "–"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    body = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in rows)
    inner = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide" role="group" tabindex="0"><table>{inner}</table></div>'
