"""Captioned pictures: `{"image": "1.jpg", "caption": "a red circle"}` → the user shows the picture, the model says it.

Media: any field whose name says so (`names.kind_by_name`). The caption: `caption`, `captions`, `text` or `comment`, the
first found; the latter two only where no question or answer stands beside them. A list of captions makes one sample
each, with ids `…#0`, `…#1`. `prompt`: what the user says in this sample.
"""

from __future__ import annotations

from collections.abc import Iterator

from opticnerve.data.formats.fields import Fields, empty, find, missing, take, text
from opticnerve.data.formats.media import Context
from opticnerve.data.formats.turns import conversation, said
from opticnerve.data.sources.base import Record
from opticnerve.types import Conversation, DataError

CAPTION_FIELDS = ("caption", "captions")
VAGUE_FIELDS = ("text", "comment")
COMPANY = (
    "question", "questions", "query", "instruction", "input", "answer", "answers", "response", "output", "label",
    "labels",     "choices", "options", "chosen", "rejected", "completion", "messages", "conversations", "A",
)  # fmt: skip
"""Beside these `text` is no caption."""


def captions(record: Record, context: Context) -> Iterator[Conversation]:
    """One conversation a caption."""
    fields, where = Fields.of(record), record.where
    if find(fields, CAPTION_FIELDS) is None and (beside := company(fields)):
        raise DataError(
            f"text beside {beside} is no caption", where=where,
            remedy=f"call it caption, or question and answer; or ignore: [{beside}]", kind="unused-field",
        )  # fmt: skip
    found = take(fields, (*CAPTION_FIELDS, *VAGUE_FIELDS), "caption", where)
    id, several = context.id(record), isinstance(found, list)
    own_prompt = find(fields, ("prompt",))
    for number, caption in enumerate(found if several else [found]):
        own = f"{id}#{number}" if several else id
        prompt = context.prompt(own) if empty(own_prompt) else text(own_prompt, "prompt", where)
        asked, answer = said("user", prompt or ""), said("assistant", text(caption, "caption", where), tags=False)
        yield with_media(conversation(fields, [asked, answer], context, where, own), fields)


def company(fields: dict[str, object]) -> str | None:
    """What shows that a `text` is part of a question."""
    return next((name for name in COMPANY if not empty(dict.get(fields, name))), None)


def with_media(made: Conversation, fields: Fields) -> Conversation:
    """The same, if it is about something.

    Raises:
        DataError: it is about no picture and no sound (kind `missing-field`).
    """
    if not made.pieces:
        raise missing(fields, ("image", "video", "audio"), "picture", made.where)
    return made
