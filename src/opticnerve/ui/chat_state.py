"""A conversation as the page keeps it, and one question put to a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opticnerve.types import Conversation, ImagePart, Message, Part, TextPart


@dataclass(frozen=True)
class ChatState:
    """What was said so far. A picture stands in the message that it came with; `picture` is the last one."""

    messages: tuple[Message, ...] = ()
    picture: str | None = None

    def asked(self, question: str, picture: str | None) -> ChatState:
        """With a question; a picture that is not the last one comes with it."""
        parts: tuple[Part, ...] = (TextPart(question),)
        if picture is not None and picture != self.picture:
            parts = (ImagePart(Path(picture)), *parts)
        return ChatState((*self.messages, Message("user", parts)), picture or self.picture)

    def answered(self, answer: str) -> ChatState:
        return replace(self, messages=(*self.messages, Message("assistant", (TextPart(answer),))))

    def bubbles(self, alt_text: str) -> list[dict[str, Any]]:
        """As gradio's chatbot takes it."""
        shown: list[dict[str, Any]] = []
        for message in self.messages:
            for part in message.parts:
                content: Any = part.text if isinstance(part, TextPart) else _file(part, alt_text)
                shown.append({"role": message.role, "content": content})
        return shown

    def about_last_picture(self) -> Conversation | None:
        """The last question with all that was said since the last picture, which is what `look` can explain."""
        asked = self.messages[:-1] if self.messages and self.messages[-1].role == "assistant" else self.messages
        with_picture = [i for i, m in enumerate(asked) if any(isinstance(p, ImagePart) for p in m.parts)]
        return Conversation(asked[with_picture[-1] :]) if with_picture else None


def _file(part: Part, alt_text: str) -> dict[str, str]:
    assert isinstance(part, ImagePart)
    return {"path": str(part.source), "alt_text": alt_text}


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
