"""The tab for runs: choose one; see its state and figures, its card, its curves and its answers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

from opticnerve.types import OpticNerveError
from opticnerve.ui import runs_html
from opticnerve.ui.runs import ShownRun, dicts, list_runs, open_run
from opticnerve.ui.runs_content import PAGE, Which, card_html, chosen, read_answers

WHICH: tuple[Which, ...] = ("all", "wrong", "right")


def runs_tab(words: runs_html.Words, root: Path) -> None:
    """Build the tab's contents within an open `gr.Blocks`; `root` is the folder of runs.

    Nothing is kept between two events: each reads the run's folder anew, by the name that the browser sends.
    """
    import gradio as gr

    shown = partial(gr.HTML, css_template=runs_html.STYLE, container=False)
    with gr.Row(equal_height=True):
        run = gr.Dropdown([], label=words("runs_run"), elem_id="runs-run", scale=4, min_width=200)
        again = gr.Button(words("runs_refresh"), elem_id="runs-refresh", scale=1, min_width=120)
    summary = shown(elem_id="runs-summary")
    with gr.Tabs():
        with gr.Tab(words("runs_card")):
            card = shown(elem_id="runs-card")
        with gr.Tab(words("runs_curves")):
            curves = shown(elem_id="runs-curves")
        with gr.Tab(words("runs_answers")):
            task = gr.Dropdown([], label=words("runs_task"), elem_id="runs-task")
            which = gr.Radio(
                [(words(f"runs_{w}_answers"), w) for w in WHICH], value="all", label=words("runs_which"),
                elem_id="runs-which",
            )  # fmt: skip
            counted = shown(elem_id="runs-counted")
            answers = shown(elem_id="runs-answers")
            page = gr.Number(1, precision=0, minimum=1, visible=False)
            with gr.Row():
                back = gr.Button(words("runs_previous"), elem_id="runs-previous", min_width=100)
                on = gr.Button(words("runs_next"), elem_id="runs-next", min_width=100)
    with gr.Accordion(words("runs_all"), open=False):
        table = shown(elem_id="runs-table")

    def refresh(name: str | None, kind: str) -> list[Any]:
        """The list of runs, and the chosen one if it is still there, else the newest."""
        found = list_runs(root)
        names = [r.name for r in found]
        picked = name if name in names else names[0] if names else None
        choices = [(_label(r, words), r.name) for r in found]
        return [gr.Dropdown(choices, value=picked), runs_html.runs_table(found, words), *show(picked, kind)]

    def show(name: str | None, kind: str) -> list[Any]:
        """What there is of one run."""
        try:
            read = open_run(root, name) if name else None
        except OpticNerveError as e:
            return nothing(words("runs_gone", why=e))
        if read is None:
            return nothing(words("runs_none", root=root))
        tasks = [str(t.get("name")) for t in read.tasks if dicts(t.get("samples"))]
        first = tasks[0] if tasks else None
        return [
            runs_html.summary(read, words), _card(read, words), runs_html.curves(read, words),
            gr.Dropdown(tasks, value=first), *_page(read, first, 1, kind, words),
        ]  # fmt: skip

    def nothing(why: str) -> list[Any]:
        return [_said(why), "", "", gr.Dropdown([], value=None), *_page(None, None, 1, "all", words)]

    def turn(by: int, name: str | None, of: str | None, kind: str, at: float | None) -> list[Any]:
        """Another page of answers; the first one where another task or kind is chosen (`by` is 0)."""
        try:
            read = open_run(root, name) if name else None
        except OpticNerveError:
            read = None
        return _page(read, of, 1 if by == 0 else int(at or 1) + by, kind, words)

    found = [page, counted, answers]
    everything = [summary, card, curves, task, *found]
    gr.on(None, lambda: refresh(None, "all"), None, [run, table, *everything], show_progress="hidden")
    again.click(refresh, [run, which], [run, table, *everything])
    run.input(show, [run, which], everything)
    for event, by in ((task.input, 0), (which.input, 0), (back.click, -1), (on.click, 1)):
        event(partial(turn, by), [run, task, which, page], found)


def _label(run: ShownRun, words: runs_html.Words) -> str:
    score = runs_html.headline(run)
    return " · ".join([run.name, words(f"runs_{run.state}"), *([score] if score else [])])


def _said(text: str) -> str:
    return str(runs_html.HTML.paragraph(text))


def _card(run: ShownRun, words: runs_html.Words) -> str:
    try:
        return card_html(run)
    except FileNotFoundError:
        return _said(words("runs_no_card"))
    except (OSError, OpticNerveError) as e:
        return str(runs_html.HTML.notes([str(e)], words))


def _page(run: ShownRun | None, task: str | None, page: int, which: str, words: runs_html.Words) -> list[Any]:
    """The page's number, which answers are on it, and these."""
    if run is None or task is None:
        return [1, "", _said(words("runs_no_answers"))]
    read, note = read_answers(run, task)
    kept = chosen(read, cast(Which, which))
    page = min(max(page, 1), max(1, -(-len(kept) // PAGE)))
    part = kept[PAGE * (page - 1) : PAGE * page]
    first = PAGE * (page - 1) + 1
    text = words("runs_shown", first=f"{first:,}", last=f"{first + len(part) - 1:,}", n=f"{len(kept):,}")
    counted = str(runs_html.HTML.status(text if part else "") + runs_html.HTML.notes([note] if note else [], words))
    return [page, counted, runs_html.answers_grid(run, part, words)]
