"""Two models, or two stages of a run, before the same picture and question."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from opticnerve.types import OpticNerveError
from opticnerve.ui.chat import Asker, ChatState, alert, note, picture_input, question_input, tokens_input, watch_picture
from opticnerve.ui.i18n import Translations
from opticnerve.ui.models import Models, PageLimits

Side = tuple[str, str]  # an answer, and HTML of what is going on


def compare(
    asker: Asker, models: tuple[str, str], question: str, picture: str | None, tokens: int
) -> Iterator[tuple[Side, Side]]:
    """Both answers as they grow: the first model's, then the second's, since one works at a time. Greedy, so that the
    models differ and not the dice. Raises Refused: the question or the picture cannot be used. What goes wrong with one
    model stands on its side."""
    question = asker.check(question, picture)
    sides: list[Side] = [("", ""), ("", note(asker.words("waits")))]
    for number, model in enumerate(models):
        try:
            if not asker.models.is_loaded(model):
                sides[number] = ("", note(asker.words("loading", model=model)))
                yield sides[0], sides[1]
                with asker.models.turn(model):  # the seconds shall be the answer's alone
                    pass
            started = time.perf_counter()
            for chat_state, doing in asker.emit(model, ChatState(), question, picture, tokens, 0.0):
                answer = chat_state.messages[-1].text if chat_state.messages[-1].role == "assistant" else ""
                sides[number] = (answer, doing)
                yield sides[0], sides[1]
            seconds = f"{time.perf_counter() - started:.1f}"
            sides[number] = (sides[number][0], note(asker.words("took", seconds=seconds)))
        except (OpticNerveError, OSError) as e:
            sides[number] = (sides[number][0], alert(str(e)))
        yield sides[0], sides[1]


def compare_tab(words: Translations, models: Models, limits: PageLimits) -> list[Any]:
    """Lay out the tab within a `gr.Blocks`; returns both dropdowns of models."""
    import gradio as gr

    asker = Asker(models, words, limits)
    names = models.choices()
    gr.Markdown(words("compare_about"))
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            picture = picture_input(words, "compare-picture")
        with gr.Column(scale=3, min_width=300):
            question = question_input(words, limits, "compare-question")
            tokens = tokens_input(words, limits, 128)
            with gr.Row(elem_classes="buttons"):
                ask = gr.Button(words("ask_both"), variant="primary", elem_id="compare-ask", min_width=90)
                stop = gr.Button(words("stop"), elem_id="compare-stop", min_width=90)
            error = gr.HTML(elem_id="compare-error", padding=False)
    dropdowns, answers, doings = [], [], []
    with gr.Row():
        for side, name in zip("ab", (names[0], names[min(1, len(names) - 1)]), strict=True):
            with gr.Column(min_width=260):
                dropdowns.append(
                    gr.Dropdown(
                        names, value=name, label=words(f"model_{side}"), filterable=False, elem_id=f"model-{side}"
                    )
                )
                answer = gr.Textbox(
                    label=words(f"answer_{side}"), interactive=False, lines=4, max_lines=14, elem_id=f"answer-{side}",
                    buttons=["copy"],
                )  # fmt: skip
                answers.append(answer)
                doings.append(gr.HTML(elem_id=f"doing-{side}", padding=False))

    def run(a: str, b: str, question: str, picture: str | None, tokens: float) -> Iterator[tuple[Any, ...]]:
        try:
            for (said_a, doing_a), (said_b, doing_b) in compare(asker, (a, b), question, picture, int(tokens)):
                yield said_a, said_b, doing_a, doing_b, ""
        except OpticNerveError as e:
            yield gr.skip(), gr.skip(), "", "", alert(str(e))

    watch_picture(picture, error, words, limits)
    asking = gr.on(
        [ask.click, question.submit], run, [*dropdowns, question, picture, tokens], [*answers, *doings, error],
        concurrency_limit=1, concurrency_id="model", show_progress="hidden",
    )  # fmt: skip
    stop.click(lambda: ("", "", ""), None, [*doings, error], cancels=[asking], show_progress="hidden")
    return dropdowns
