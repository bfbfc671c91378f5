"""The tab for training: start a recipe, watch it train, save and stop it, go on with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from opticnerve.types import OpticNerveError
from opticnerve.ui.runs import TrainingJob, list_runs
from opticnerve.ui.runs_html import HTML, STYLE, Words, curve_figure, curve_of, pace, span, speed
from opticnerve.ui.train_process import Watched, free_name, list_recipes, resume, start, stop, watch

EVERY = 2.0
"""Seconds between two looks at the training."""


def train_tab(words: Words, root: Path) -> None:
    """Build the tab's contents within an open `gr.Blocks`; `root` is the folder of runs.

    What is shown comes from the run's folder at each look, so that a page that is loaded again, or a second one, shows
    the same.
    """
    import gradio as gr

    shown = partial(gr.HTML, css_template=STYLE, container=False)
    shown(str(HTML.paragraph(words("train_intro"))))
    with gr.Row():

        def field(kind: Any, key: str, **more: Any) -> Any:
            info = words(f"train_{key}_info", root=root)
            return kind(label=words(f"train_{key}"), info=info, elem_id=f"train-{key}", min_width=220, **more)

        recipe = field(gr.Dropdown, "recipe", choices=[])
        name, changes = (field(gr.Textbox, key, max_lines=1) for key in ("name", "changes"))
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

    def refresh(before: str, *, fresh: bool = False) -> list[Any]:
        try:
            seen = watch(root)
        except (OSError, OpticNerveError) as e:  # a folder that is taken away meanwhile, too
            text = str(HTML.notes([str(e)], words))
            return [text, *([gr.skip()] * 5), text] if text != before else [gr.skip()] * 7
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
            free_name(root, first) if first else "", *refresh("", fresh=True),
        ]  # fmt: skip

    def act(what: Callable[[], TrainingJob], text: str) -> tuple[bool, list[Any]]:
        """Do it, say what was done or why not, and look."""
        try:
            said, done = words(text, run=what().run), True
        except (OpticNerveError, OSError) as e:
            said, done = words("train_refused", why=e), False
        return done, [_status(said), *refresh("", fresh=True)]

    def begin_one(choice: str | None, named: str | None, changed: str | None) -> list[Any]:
        if not choice:
            return [_status(words("train_refused", why=words("train_pick_recipe"))), *([gr.skip()] * 8)]
        done, shows = act(partial(start, root, choice, (named or "").strip(), changed or ""), "train_started")
        return [*shows, free_name(root, choice) if done else gr.skip()]

    def resume_one(chosen: str | None) -> list[Any]:
        if not chosen:
            return [_status(words("train_refused", why=words("train_pick_run"))), *([gr.skip()] * 7)]
        return act(partial(resume, root, chosen), "train_resumed")[1]

    def stop_it() -> list[Any]:
        return act(partial(stop, root), "train_asked")[1]

    seen = [state, curve, log, end, begin, unfinished, last]
    quiet: Any = {"show_progress": "hidden"}
    gr.on(None, load, None, [recipe, name, *seen], **quiet)
    # Beside the queue: where questions wait for an answer, a look at the training does not wait with them.
    gr.Timer(EVERY).tick(refresh, last, seen, queue=False, **quiet)
    recipe.input(lambda choice: free_name(root, choice) if choice else "", recipe, name, **quiet)
    begin.click(begin_one, [recipe, name, changes], [message, *seen, name], **quiet)
    go_on.click(resume_one, unfinished, [message, *seen], **quiet)
    end.click(stop_it, None, [message, *seen], **quiet)


def _status(text: str) -> str:
    return str(HTML.status(text))


def _unfinished(root: Path) -> list[str]:
    return [run.name for run in list_runs(root) if run.state == "stopped"]


def _mark(seen: Watched) -> str:
    """Differs whenever something that is shown does; its first word, whenever the training's state does."""
    run = seen.job.run if seen.job is not None else ""
    steps = seen.stage.steps if seen.stage is not None else 0
    return f"{seen.doing} {run!r} {seen.number} {steps} {seen.total} {hash(tuple(seen.log))}"


def _state(seen: Watched, words: Words) -> str:
    if seen.job is None:
        return str(HTML.paragraph(words("train_idle")))
    live, stage, total = seen.doing in ("running", "stopping"), seen.stage, seen.total
    figures = []
    if stage is not None:
        if known := curve_of(stage.metrics).known:
            figures.append((words("train_loss"), f"{known[-1]:.4g}", ""))
        if text := speed(stage, words):
            figures.append((words("train_speed"), text, ""))
        step_s = pace(stage.metrics)[0]
        if live and total and math.isfinite(step_s) and stage.steps < total:
            figures.append((words("train_left"), span(step_s * (total - stage.steps), words), ""))
    return str(HTML.training(seen, live, figures, words))


def _curve(seen: Watched, words: Words) -> str:
    return "" if seen.stage is None else curve_figure(seen.stage, words, planned=seen.total)


def _log(seen: Watched, words: Words) -> str:
    text = "\n".join(line[:300] for line in seen.log) or words("train_no_log")
    return "" if seen.job is None else str(HTML.log(text))
