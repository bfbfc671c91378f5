"""The first tab: a picture, a conversation about it, and where the model looks for each word of its answer."""

from __future__ import annotations

import html
from abc import ABCMeta
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opticnerve.data.formats.boxes import boxes_in
from opticnerve.data.media.marks import marked
from opticnerve.data.media.open import image_size, open_image
from opticnerve.data.media.timeline import sampling_of
from opticnerve.data.media.video import in_order, pixels_in
from opticnerve.types import Conversation, DataError, Frame, ImagePart, Message, OpticNerveError, Part, TextPart
from opticnerve.ui.i18n import Translations
from opticnerve.ui.models import Models, PageLimits


class Refused(OpticNerveError):
    """What cannot be done, in the page's language."""


def check_picture(path: str | None, words: Translations, limits: PageLimits) -> None:
    """Open a picture as training and `opticnerve ask` do; None (no picture) is fine. Raises Refused: the file is too
    large, has too many pixels, or is no picture that can be read."""
    if path is None:
        return
    _check_bytes(path, words, limits)
    try:
        height, width = image_size(Path(path))
        if height * width > limits.pixels:
            raise Refused(
                words("too_many_pixels", found=f"{width:,} × {height:,}", most=f"{limits.pixels:,}"), kind="too-large"
            )
        open_image(Path(path), max_pixels=limits.pixels)
    except DataError as e:
        # The opener's own words name the file where it lies on the server, which is nothing for a page.
        raise Refused(words("broken_picture", formats="PNG, JPEG, WebP, GIF, BMP, TIFF"), kind="damaged") from e


def check_video(path: str | None, words: Translations, limits: PageLimits) -> None:
    """As `check_picture`, for a video, of whose frames no pixel is looked at yet."""
    if path is None:
        return
    _check_bytes(path, words, limits)
    try:
        cost = pixels_in(Path(path))
    except DataError as e:
        raise Refused(words("broken_video", formats="MP4, WebM, MKV, MOV, AVI, GIF"), kind="damaged") from e
    if cost > limits.video_pixels:
        found, most = f"{cost:,}", f"{limits.video_pixels:,}"
        raise Refused(words("long_video", found=found, most=most), kind="too-large")


def _check_bytes(path: str, words: Translations, limits: PageLimits) -> None:
    if (size := Path(path).stat().st_size) > limits.upload_bytes:
        raise Refused(words("too_many_bytes", found=f"{size:,}", most=f"{limits.upload_bytes:,}"), kind="too-large")


def alert(message: str) -> str:
    """HTML that a screen reader speaks at once; empty for no message."""
    return f'<p role="alert" class="alert">{html.escape(message)}</p>' if message else ""


def note(message: str) -> str:
    """HTML of a quiet remark: what is being done."""
    return f'<p role="status" class="note">{html.escape(message)}</p>' if message else ""


def picture_input(words: Translations, elem_id: str) -> Any:
    """A picture's place: drop, paste, choose or photograph. Its value is the uploaded file as it came."""
    import gradio as gr

    def preprocess(self: Any, payload: Any) -> str | None:
        return None if payload is None else str(payload.path)

    # Gradio would open the file itself, with limits of its own and errors in its own words; that is `check_picture`'s
    # work. A `class` statement would do, but for gradio's metaclass, which writes a file of stubs beside the source.
    uploaded = ABCMeta.__new__(
        type(gr.Image), "Uploaded", (gr.Image,),
        {"preprocess": preprocess, "is_template": True, "__module__": __name__},  # to the browser it is a gr.Image
    )  # fmt: skip
    return uploaded(
        type="filepath", sources=["upload", "clipboard", "webcam"], label=words("picture"), height=280, elem_id=elem_id,
        buttons=["fullscreen"], webcam_options=gr.WebcamOptions(mirror=False), placeholder=words("picture_place"),
        alt_text=words("picture"),
    )  # fmt: skip


def video_input(words: Translations, elem_id: str) -> Any:
    """A video's place. Its value is the uploaded file as it came."""
    import gradio as gr

    return gr.File(
        type="filepath", file_count="single", file_types=["video", ".gif"], label=words("video"), height=120,
        elem_id=elem_id,
    )  # fmt: skip


def question_input(words: Translations, limits: PageLimits, elem_id: str) -> Any:
    import gradio as gr

    return gr.Textbox(
        label=words("question"), placeholder=words("question_place"), lines=1, max_lines=6, elem_id=elem_id,
        max_length=limits.question_characters,
    )  # fmt: skip


def tokens_input(words: Translations, limits: PageLimits, usual: int) -> Any:
    import gradio as gr

    most = limits.answer_tokens
    return gr.Slider(1, most, value=min(usual, most), step=1, label=words("longest_answer"))


def watch_picture(picture: Any, error: Any, words: Translations, limits: PageLimits) -> None:
    """Say at once, in `error`, what is wrong with a new picture, and take it away."""
    import gradio as gr

    def show_image(path: str | None) -> tuple[Any, Any]:
        if path is None:  # taken away: by the visitor, or here because of what the error says
            return gr.skip(), gr.skip()
        try:
            check_picture(path, words, limits)
        except Refused as e:
            return None, alert(str(e))
        return gr.skip(), ""

    # Not through the queue: gradio's page loses a question that is sent while the stream of an event before it closes.
    picture.change(show_image, picture, [picture, error], show_progress="hidden", queue=False)


@dataclass(frozen=True)
class ChatState:
    """What was said so far. A picture or a video stands in the message that it came with; `picture` and `video` are the
    last ones."""

    messages: tuple[Message, ...] = ()
    picture: str | None = None
    video: str | None = None

    def asked(
        self, question: str, picture: str | None, video: str | None = None, frames: Sequence[ImagePart] = ()
    ) -> ChatState:
        """With a question; a picture that is not the last one comes with it, and a video as `frames`."""
        parts: tuple[Part, ...] = (*frames, TextPart(question))
        if picture is not None and picture != self.picture:
            parts = (ImagePart(Path(picture)), *parts)
        return ChatState((*self.messages, Message("user", parts)), picture or self.picture, video or self.video)

    def answered(self, answer: str) -> ChatState:
        return replace(self, messages=(*self.messages, Message("assistant", (TextPart(answer),))))

    def bubbles(self, alt_text: str) -> list[dict[str, Any]]:
        """As gradio's chatbot takes it."""

        def content(part: Part) -> Any:
            if isinstance(part, TextPart):
                return part.text
            frame = _frame(part)
            return {"path": str(part.source if frame is None else frame.source), "alt_text": alt_text}

        return [
            {"role": message.role, "content": shown}
            for message in self.messages
            for p in message.parts
            if (frame := _frame(p)) is None or frame.index == 0  # a video's first frame stands for it
            for shown in (content(p), *self._boxes(message, alt_text))
        ]

    def _boxes(self, message: Message, alt_text: str) -> list[Any]:
        """The last picture with the boxes that an answer names, in thousandths of its sides."""
        found = [b for b in boxes_in(message.text) if len(b) == 4] if message.role == "assistant" else []
        if not found or self.picture is None:
            return []
        import gradio as gr

        return [gr.Image(marked(open_image(Path(self.picture)), found), label=alt_text, container=False)]

    def about_last_picture(self) -> Conversation | None:
        """The last question with all that was said since the last picture, which is what `look` can explain; None where
        there was none, or a video."""
        asked = self.messages[:-1] if self.messages and self.messages[-1].role == "assistant" else self.messages
        with_picture = [i for i, m in enumerate(asked) if any(isinstance(p, ImagePart) for p in m.parts)]
        since = Conversation(asked[with_picture[-1] :]) if with_picture else None
        return None if since is None or any(map(_frame, since.images)) else since


def _frame(part: Part) -> Frame | None:
    """The video's frame that a part shows, where it shows one."""
    return part.source if isinstance(part, ImagePart) and isinstance(part.source, Frame) else None


def stream(answerer: Any, chat_state: ChatState, *, tokens: int, temperature: float = 0.0) -> Iterator[str]:
    """The answer so far, each time it has grown. Closing the iterator stops the model."""
    said = ""
    pieces = answerer.stream(Conversation(chat_state.messages), max_new_tokens=tokens, temperature=temperature)
    try:
        for piece in pieces:
            said += piece
            if said.strip():
                yield said.strip()
    finally:
        pieces.close()


@dataclass(frozen=True)
class Asker:
    """What the tab does, without the page: it turns one question into the states that the page shows on the way."""

    models: Models
    words: Translations
    limits: PageLimits

    def check(self, question: str, picture: str | None, video: str | None = None) -> str:
        """The question without spaces around. Raises Refused: it is empty or too long, or the picture or the video
        cannot be used."""
        question = question.strip()
        if not question:
            raise Refused(self.words("no_question"), kind="empty")
        if len(question) > self.limits.question_characters:
            raise Refused(
                self.words("long_question", found=len(question), most=f"{self.limits.question_characters:,}"),
                kind="too-long",
            )
        check_picture(picture, self.words, self.limits)
        check_video(video, self.words, self.limits)
        return question

    def emit(
        self, model: str, chat_state: ChatState, question: str, picture: str | None, tokens: int, temperature: float,
        video: str | None = None,
    ) -> Iterator[tuple[ChatState, str]]:  # fmt: skip
        """The conversation as it grows, and HTML of what is going on. Raises OpticNerveError: in the page's language
        where the page found it, else in the package's own words."""
        question = self.check(question, picture, video)
        asked = chat_state.asked(question, picture)
        yield asked, note(self.words("thinking" if self.models.is_loaded(model) else "loading", model=model))
        answer = ""
        with self.models.turn(model) as answerer:
            if video is not None and video != chat_state.video:  # the frames that this model's training took
                frames = in_order(Path(video), sampling_of(answerer.processor.frames))
                asked = chat_state.asked(question, picture, video, frames)
            for answer in stream(answerer, asked, tokens=tokens, temperature=temperature):
                yield asked.answered(answer), ""
        if not answer:
            raise Refused(self.words("no_answer"), kind="empty")
