"""Beneath a conversation: where in the picture the model looks for each word of its last answer.

The same maps as `opticnerve look` draws, one word at a time, which a phone can show. docs/look.md says how to read
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from opticnerve.types import Conversation, OpticNerveError
from opticnerve.ui.chat import ChatState, Refused, alert, note
from opticnerve.ui.i18n import Translations
from opticnerve.ui.models import Models

if TYPE_CHECKING:
    from opticnerve.interpret.attribution import Attribution

AUTO = "auto"
TOKENS = 24  # of the explained answer: each takes a pass backwards


@dataclass(frozen=True)
class AttributionMaps:
    """Maps for all words of an answer (`interpret.attribution`), with what they are maps of."""

    looked: Any
    picture: Path

    def drawings(self, number: int) -> list[PIL.Image.Image]:
        """The maps of one word, a picture for each method."""
        from opticnerve.data.media.open import open_image

        shown = np.asarray(open_image(self.picture))
        return [_draw(shown, self.looked, found, number) for found in self.looked.maps]

    def described(self, number: int, words: Translations) -> str:
        """The same in words, for those who do not see the drawing: the place of each method's highest cell."""
        places = []
        for found in self.looked.maps:
            x, y = found.peak(number)
            places.append(words("look_peak", method=title_of(found.method), x=f"{x:.0%}", y=f"{y:.0%}"))
        return words("look_told", word=self.looked.words[number].text, places="; ".join(places))


def _draw(shown: NDArray[Any], looked: Attribution, found: Any, number: int) -> PIL.Image.Image:
    """One panel of `opticnerve look` by itself, as wide as a phone shows it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from opticnerve.common.drawing import INK, dressed
    from opticnerve.interpret.plot import panel

    side, head, rim = 3.6, 0.62, 0.12  # inches
    height = min(max(side * shown.shape[0] / shown.shape[1], 0.5), 3 * side)
    figure = Figure(figsize=(side + 2 * rim, height + head + rim), dpi=150, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    whole = figure.get_figheight()
    figure.text(rim / (side + 2 * rim), 1 - 0.08 / whole, title_of(found.method), fontsize=12, color=INK, va="top")
    panel(
        figure.add_axes((rim / (side + 2 * rim), rim / whole, side / (side + 2 * rim), height / whole)), shown, looked,
        found, number,
    )  # fmt: skip
    with dressed(figure):
        canvas.draw()
    return PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def title_of(method: str) -> str:
    """A method's name as the command line's panels write it."""
    return method.replace("_", "-")


def see(models: Models, model: str, conversation: Conversation, method: str) -> AttributionMaps:
    """Maps of the model's greedy answer to a conversation. Raises OpticNerveError: the model's parts do not allow the
    method, or no map at all."""
    from opticnerve.interpret.attribution import attribute

    with models.turn(model, exact=True) as answerer:
        looked = attribute(
            answerer.model, answerer.processor, conversation, methods=None if method == AUTO else [method],
            max_new_tokens=TOKENS,
        )  # fmt: skip
    return AttributionMaps(looked, Path(str(conversation.images[0].source)))


def look_part(words: Translations, models: Models, model: Any, chat_state: Any) -> tuple[Any, None, list[Any]]:
    """Lay it out; returns (function, inputs, outputs) that take the maps away, for when they are no longer of the last
    answer."""
    import gradio as gr

    from opticnerve.interpret.attribution import METHODS

    seen = gr.State(None)
    with gr.Row(elem_classes="buttons look"):
        button = gr.Button(words("look"), elem_id="look", min_width=160, scale=2)
        method = gr.Dropdown(
            [(words("look_auto"), AUTO), *((title_of(m), m) for m in METHODS)], value=AUTO,
            label=words("look_method"), filterable=False, elem_id="look-method", min_width=160, scale=1,
        )  # fmt: skip
    error = gr.HTML(elem_id="look-error", padding=False)
    word = gr.Radio([], label=words("look_word"), visible=False, elem_id="look-word", interactive=True)
    with gr.Row():
        # The method that was chosen, and occlusion beside it.
        drawings = [
            gr.Image(
                format="png", interactive=False, visible=False, elem_id=f"look-drawing-{i}", show_label=False,
                label=words("look_drawing"), alt_text=words("look_drawing"), buttons=["download", "fullscreen"],
                min_width=280,
            )
            for i in range(2)
        ]  # fmt: skip
    described = gr.HTML(elem_id="look-told", padding=False)
    outputs = [seen, error, word, *drawings, described]

    def away() -> tuple[Any, ...]:
        hidden = gr.update(value=None, visible=False)
        return None, "", gr.update(choices=[], value=None, visible=False), hidden, hidden, ""

    def run(model: str, chat_state: ChatState, method: str) -> Iterator[tuple[Any, ...]]:
        yield None, note(words("looking")), *away()[2:]
        try:
            conversation = chat_state.about_last_picture()
            if conversation is None:
                raise Refused(words("look_nothing"), kind="empty")
            made = see(models, model, conversation, method)
        except (OpticNerveError, OSError) as e:
            yield None, alert(str(e)), *away()[2:]
            return
        choices = [(w.text, i) for i, w in enumerate(made.looked.words)]
        yield (
            made, note(words("look_answer", most=TOKENS, answer=made.looked.answer)),
            gr.update(choices=choices, value=0, visible=True), *_drawn(made, 0, words),
        )  # fmt: skip

    def choose(seen: AttributionMaps | None, number: int | None) -> tuple[Any, ...]:
        if seen is None or number is None:
            return gr.skip(), gr.skip(), gr.skip()
        return _drawn(seen, number, words)

    button.click(
        run, [model, chat_state, method], outputs, concurrency_limit=1, concurrency_id="model",
        show_progress="minimal", show_progress_on=error,
    )  # fmt: skip
    word.input(choose, [seen, word], [*drawings, described], show_progress="hidden")
    return away, None, outputs


def _drawn(seen: AttributionMaps, number: int, words: Translations) -> tuple[Any, ...]:
    """Updates of both drawings (the second is away where occlusion alone was asked for), and the text beneath."""
    import gradio as gr

    text = seen.described(number, words)
    shown = [gr.update(value=drawing, visible=True, alt_text=text) for drawing in seen.drawings(number)]
    away = [gr.update(value=None, visible=False)] * (2 - len(shown))
    return *shown, *away, note(text)
