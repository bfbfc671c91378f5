"""The first tab: a picture, a conversation about it, and where the model looks for each word of its answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opticnerve.types import OpticNerveError
from opticnerve.ui.chat_state import ChatState, stream
from opticnerve.ui.i18n import Translations
from opticnerve.ui.limits import Limits
from opticnerve.ui.look_part import look_part
from opticnerve.ui.models import Models
from opticnerve.ui.picture import Refused, alert, check_picture, note, picture_input, watch_picture


@dataclass(frozen=True)
class Asker:
    """What the tab does, without the page: it turns one question into the states that the page shows on the way."""

    models: Models
    words: Translations
    limits: Limits

    def check(self, question: str, picture: str | None) -> str:
        """The question without spaces around.

        Raises:
            Refused: it is empty or too long, or the picture cannot be used.
        """
        question = question.strip()
        if not question:
            raise Refused(self.words("no_question"))
        if len(question) > self.limits.question_characters:
            raise Refused(self.words("long_question", found=len(question), most=f"{self.limits.question_characters:,}"))
        check_picture(picture, self.words, self.limits)
        return question

    def emit(
        self, model: str, chat_state: ChatState, question: str, picture: str | None, tokens: int, temperature: float
    ) -> Iterator[tuple[ChatState, str]]:
        """The conversation as it grows, and HTML of what is going on.

        Raises:
            OpticNerveError: in the page's language where the page found it, else in the package's own words.
        """
        asked = chat_state.asked(self.check(question, picture), picture)
        yield asked, note(self.words("thinking" if self.models.is_loaded(model) else "loading", model=model))
        answer = ""
        with self.models.turn(model) as answerer:
            for answer in stream(answerer, asked, tokens=tokens, temperature=temperature):
                yield asked.answered(answer), ""
        if not answer:
            raise Refused(self.words("no_answer"))


def chat_tab(words: Translations, models: Models, limits: Limits) -> Any:
    """Lay out the tab within a `gr.Blocks`; returns the model's dropdown, whose choices change as runs end."""
    import gradio as gr

    asker = Asker(models, words, limits)
    names = models.choices()
    chat_state = gr.State(ChatState())
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            model = gr.Dropdown(names, value=names[0], label=words("model"), filterable=False, elem_id="model")
            picture = picture_input(words, "picture")
            with gr.Accordion(words("settings"), open=False):
                tokens = gr.Slider(
                    1, limits.answer_tokens, value=min(256, limits.answer_tokens), step=1, label=words("longest_answer")
                )
                temperature = gr.Slider(
                    0, 2, value=0, step=0.1, label=words("temperature"), info=words("temperature_info")
                )
        with gr.Column(scale=3, min_width=300):
            chat = gr.Chatbot(
                label=words("conversation"), height=380, elem_id="conversation", render_markdown=False,
                feedback_options=None, buttons=["copy"], placeholder=words("conversation_place"),
            )  # fmt: skip
            error = gr.HTML(elem_id="chat-error", padding=False)
            question = gr.Textbox(
                label=words("question"), placeholder=words("question_place"), lines=1, max_lines=6, elem_id="question",
                max_length=limits.question_characters,
            )  # fmt: skip
            with gr.Row(elem_classes="buttons"):
                send = gr.Button(words("send"), variant="primary", elem_id="send", min_width=90)
                stop = gr.Button(words("stop"), elem_id="stop", min_width=90)
                fresh = gr.Button(words("new_conversation"), elem_id="new", min_width=90)
    forget_maps = look_part(words, models, model, chat_state)

    def emit(
        model: str, chat_state: ChatState, question: str, picture: str | None, tokens: float, temperature: float
    ) -> Iterator[tuple[Any, ...]]:
        kept = chat_state
        try:
            for kept, doing in asker.emit(model, chat_state, question, picture, int(tokens), temperature):
                yield kept, kept.bubbles(words("picture")), doing, ""
        except (OpticNerveError, OSError) as e:
            # What was said before stays, and the question goes back to where it can be mended.
            answered = kept if kept.messages[len(chat_state.messages) + 1 :] else chat_state
            yield answered, answered.bubbles(words("picture")), alert(str(e)), question

    watch_picture(picture, error, words, limits)
    asking = gr.on(
        [send.click, question.submit], emit, [model, chat_state, question, picture, tokens, temperature],
        [chat_state, chat, error, question], concurrency_limit=1, concurrency_id="model", show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip
    # The maps are of the last answer; a new question makes it the last but one.
    gr.on([send.click, question.submit], *forget_maps, show_progress="hidden", api_visibility="private")
    chat.clear(ChatState, None, chat_state, show_progress="hidden", api_visibility="private")
    stop.click(lambda: "", None, error, cancels=[asking], show_progress="hidden", api_visibility="private")
    fresh.click(
        lambda: (ChatState(), [], "", ""), None, [chat_state, chat, error, question], cancels=[asking],
        show_progress="hidden",
        api_visibility="private",
    ).then(*forget_maps, show_progress="hidden", api_visibility="private")  # fmt: skip
    return model
