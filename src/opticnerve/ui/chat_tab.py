"""The tab in which a model is talked to, with what its answers look at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opticnerve.types import OpticNerveError
from opticnerve.ui.chat import (
    Asker,
    ChatState,
    alert,
    picture_input,
    question_input,
    tokens_input,
    video_input,
    watch_picture,
)
from opticnerve.ui.i18n import Translations
from opticnerve.ui.look import look_part
from opticnerve.ui.models import Models, PageLimits


def chat_tab(words: Translations, models: Models, limits: PageLimits) -> Any:
    """Lay out the tab within a `gr.Blocks`; returns the model's dropdown, whose choices change as runs end."""
    import gradio as gr

    asker = Asker(models, words, limits)
    names = models.choices()
    chat_state = gr.State(ChatState())
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            model = gr.Dropdown(names, value=names[0], label=words("model"), filterable=False, elem_id="model")
            picture = picture_input(words, "picture")
            with gr.Accordion(words("video"), open=False, elem_id="video-part"):
                video = video_input(words, "video")
            with gr.Accordion(words("settings"), open=False):
                tokens = tokens_input(words, limits, 256)
                temperature = gr.Slider(
                    0, 2, value=0, step=0.1, label=words("temperature"), info=words("temperature_info")
                )
        with gr.Column(scale=3, min_width=300):
            chat = gr.Chatbot(
                label=words("conversation"), height=380, elem_id="conversation", render_markdown=False,
                feedback_options=None, buttons=["copy"], placeholder=words("conversation_place"),
            )  # fmt: skip
            error = gr.HTML(elem_id="chat-error", padding=False)
            question = question_input(words, limits, "question")
            with gr.Row(elem_classes="buttons"):
                send = gr.Button(words("send"), variant="primary", elem_id="send", min_width=90)
                stop = gr.Button(words("stop"), elem_id="stop", min_width=90)
                fresh = gr.Button(words("new_conversation"), elem_id="new", min_width=90)
    forget_maps = look_part(words, models, model, chat_state)

    def emit(
        model: str, chat_state: ChatState, question: str, picture: str | None, video: str | None, tokens: float,
        temperature: float,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        kept = chat_state
        try:
            for kept, doing in asker.emit(model, chat_state, question, picture, int(tokens), temperature, video):
                yield kept, kept.bubbles(words("picture")), doing, ""
        except (OpticNerveError, OSError) as e:
            # What was said before stays, and the question goes back to where it can be mended.
            answered = kept if kept.messages[len(chat_state.messages) + 1 :] else chat_state
            yield answered, answered.bubbles(words("picture")), alert(str(e)), question

    watch_picture(picture, error, words, limits)
    asking = gr.on(
        [send.click, question.submit], emit, [model, chat_state, question, picture, video, tokens, temperature],
        [chat_state, chat, error, question], concurrency_limit=1, concurrency_id="model", show_progress="hidden",
    )  # fmt: skip
    # The maps are of the last answer; a new question makes it the last but one.
    gr.on([send.click, question.submit], *forget_maps, show_progress="hidden")
    chat.clear(ChatState, None, chat_state, show_progress="hidden")
    stop.click(lambda: "", None, error, cancels=[asking], show_progress="hidden")
    fresh.click(
        lambda: (ChatState(), [], "", ""), None, [chat_state, chat, error, question], cancels=[asking],
        show_progress="hidden",
    ).then(*forget_maps, show_progress="hidden")  # fmt: skip
    return model
