"""The tab for training: start a recipe, watch it train, save and stop it, go on with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from opticnerve.types import OpticNerveError
from opticnerve.ui import runs_html
from opticnerve.ui.runs import Job, list_runs
from opticnerve.ui.train_process import Watched, free_name, list_recipes, resume, start, stop, watch

EVERY = 2.0
"""Seconds between two looks at the training."""


def train_tab(words: runs_html.Words, root: Path) -> None:
    """Build the tab's contents within an open `gr.Blocks`; `root` is the folder of runs.

    What is shown comes from the run's folder at each look, so that a page that is loaded again, or a second one, shows
    the same.
    """
    import gradio as gr

    shown = partial(gr.HTML, css_template=runs_html.STYLE, container=False)
    shown(f"<p>{escape(words('train_intro'))}</p>")
    with gr.Row():
        recipe = gr.Dropdown(
            [], label=words("train_recipe"), info=words("train_recipe_info", root=root), elem_id="train-recipe",
            min_width=220,
        )  # fmt: skip
        name = gr.Textbox(
            label=words("train_name"), info=words("train_name_info", root=root), max_lines=1, elem_id="train-name",
            min_width=220,
        )  # fmt: skip
        changes = gr.Textbox(
            label=words("train_changes"), info=words("train_changes_info"), max_lines=1, elem_id="train-changes",
            min_width=220,
        )  # fmt: skip
    begin = gr.Button(words("train_start"), variant="primary", elem_id="train-start")
    with gr.Row(equal_height=True):
        unfinished = gr.Dropdown([], label=words("train_unfinished"), elem_id="train-unfinished", min_width=220)
        go_on = gr.Button(words("train_resume"), elem_id="train-resume", min_width=140)
    message = shown(elem_id="train-message")
    state = shown(elem_id="train-state")
    end = gr.Button(words("train_stop"), variant="stop", interactive=False, elem_id="train-stop")
    curve = shown(elem_id="train-curve")
    with gr.Accordion(words("train_log"), open=True):
        log = shown(elem_id="train-log")
    last = gr.State("")  # what this page shows, so that it is drawn anew only when something has changed

    def attribute(before: str, *, fresh: bool = False) -> list[Any]:
        try:
            seen = watch(root)
        except (OSError, OpticNerveError) as e:  # a folder that is taken away meanwhile, too
            told = runs_html.notes([str(e)], words)
            return [told, *([gr.skip()] * 5), told] if told != before else [gr.skip()] * 7
        mark = _mark(seen)
        if mark == before and not fresh:
            return [gr.skip()] * 7
        live, changed = seen.doing in ("running", "stopping"), fresh or mark.split()[0] != before.partition(" ")[0]
        return [
            _state(seen, words), _curve(seen, words), _log(seen, words),
            gr.Button(interactive=seen.doing == "running"), gr.Button(interactive=not live),
            gr.Dropdown(_unfinished(root)) if changed else gr.skip(), mark,
        ]  # fmt: skip

    def load() -> list[Any]:
        known = list_recipes(root)
        first = known[0] if known else None
        return [
            gr.Dropdown([(c.partition(":")[2], c) for c in known], value=first),
            free_name(root, first) if first else "", *attribute("", fresh=True),
        ]  # fmt: skip

    def act(what: Callable[[], Job], told: str) -> tuple[bool, list[Any]]:
        """Do it, say what was done or why not, and look."""
        try:
            said, done = words(told, run=what().run), True
        except (OpticNerveError, OSError) as e:
            said, done = words("train_refused", why=e), False
        return done, [_status_text(said), *attribute("", fresh=True)]

    def begin_one(choice: str | None, named: str | None, changed: str | None) -> list[Any]:
        if not choice:
            return [_status_text(words("train_refused", why=words("train_pick_recipe"))), *([gr.skip()] * 8)]
        done, shows = act(partial(start, root, choice, (named or "").strip(), changed or ""), "train_started")
        return [*shows, free_name(root, choice) if done else gr.skip()]

    def resume_one(chosen: str | None) -> list[Any]:
        if not chosen:
            return [_status_text(words("train_refused", why=words("train_pick_run"))), *([gr.skip()] * 7)]
        return act(partial(resume, root, chosen), "train_resumed")[1]

    def stop_it() -> list[Any]:
        return act(partial(stop, root), "train_asked")[1]

    seen = [state, curve, log, end, begin, unfinished, last]
    private: Any = {"api_visibility": "private", "show_progress": "hidden"}
    gr.on(None, load, None, [recipe, name, *seen], **private)
    # Beside the queue: where questions wait for an answer, a look at the training does not wait with them.
    gr.Timer(EVERY).tick(attribute, last, seen, queue=False, **private)
    recipe.input(lambda choice: free_name(root, choice) if choice else "", recipe, name, **private)
    begin.click(begin_one, [recipe, name, changes], [message, *seen, name], **private)
    go_on.click(resume_one, unfinished, [message, *seen], **private)
    end.click(stop_it, None, [message, *seen], **private)


def _status_text(text: str) -> str:
    """Read out by screen readers when it changes."""
    return f'<p role="status">{escape(text)}</p>'


def _unfinished(root: Path) -> list[str]:
    return [run.name for run in list_runs(root) if run.state == "stopped"]


def _mark(seen: Watched) -> str:
    """Differs whenever something that is shown does; its first word, whenever the training's state does."""
    run = seen.job.run if seen.job is not None else ""
    steps = seen.stage.steps if seen.stage is not None else 0
    return f"{seen.doing} {run!r} {seen.number} {steps} {seen.total} {hash(tuple(seen.log))}"


def _state(seen: Watched, words: runs_html.Words) -> str:
    head = f'<strong class="state">{escape(words(f"train_{seen.doing}"))}</strong>'
    if seen.job is None:
        return f"<p>{escape(words('train_idle'))}</p>"
    head = f"<h2>{escape(seen.job.run)} {head}</h2>"
    typed = f"<p>{escape(words('train_by_hand'))}: <code>{escape(seen.job.command)}</code></p>"
    live = seen.doing in ("running", "stopping")
    if seen.stage is None:
        return head + (f"<p>{escape(words('train_preparing'))}</p>" if live else "") + typed
    stage, total = seen.stage, seen.total
    place = words("train_stage", number=seen.number, count=seen.count, name=stage.name)
    done = words("train_step_open", done=f"{stage.steps:,}")
    bar = ""
    if total:
        done = words("train_step", done=f"{stage.steps:,}", total=f"{total:,}")
        bar = f'<progress max="{total}" value="{stage.steps}" aria-label="{escape(done)}"></progress>'
    figures = []
    known = [v for v in runs_html.curve_of(stage.metrics).smooth if math.isfinite(v)]
    if known:
        figures.append((words("train_loss"), f"{known[-1]:.4g}"))
    step_s, tokens_s = runs_html.pace(stage.metrics)
    if math.isfinite(tokens_s):
        figures.append((words("train_speed"), words("runs_curve_pace", tokens=f"{tokens_s:,.0f}")))
    if live and total and math.isfinite(step_s) and stage.steps < total:
        figures.append((words("train_left"), runs_html.span(step_s * (total - stage.steps), words)))
    after = f"<p>{escape(words('train_after_steps'))}</p>" if live and total and stage.steps >= total else ""
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in figures)
    return f'{head}<p>{escape(place)} · {escape(done)}</p>{bar}{after}<dl class="figures">{cells}</dl>{typed}'


def _curve(seen: Watched, words: runs_html.Words) -> str:
    if seen.stage is None:
        return ""
    return runs_html.curve_figure(seen.stage, words, planned=seen.total)


def _log(seen: Watched, words: runs_html.Words) -> str:
    if seen.job is None:
        return ""
    text = "\n".join(line[:300] for line in seen.log) or words("train_no_log")
    return f'<pre class="log" tabindex="0">{escape(text)}</pre>'
