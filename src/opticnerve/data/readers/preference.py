"""Which of two answers people prefer: `{"image": "1.jpg", "question": "what shape?", "chosen": "a circle", "rejected":
"a dog"}`, or TRL's form, where `prompt`, `chosen` and `rejected` are chat messages.

The conversation ends with the chosen answer; `Conversation.meta["rejected"]` holds the words of the other one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from opticnerve.data.readers.chat import chat
from opticnerve.data.readers.fields import AUDIO_FIELDS, IMAGE_FIELDS, Context, find, objects, take, text
from opticnerve.data.readers.records import Record
from opticnerve.types import Conversation, DataError, Message, TextPart

PROMPT_FIELDS = ("prompt", "question")


def preference(record: Record, context: Context) -> Iterator[Conversation]:
    """One conversation a record."""
    where = record.where
    asked = take(record, PROMPT_FIELDS, "question")
    answers = {name: _answer(take(record, (name,), f"{name} answer"), name, where) for name in ("chosen", "rejected")}
    if answers["chosen"].strip() == answers["rejected"].strip():
        raise DataError(
            "the chosen and the rejected answer are the same", where=where, remedy="remove the sample",
            kind="same-answers",
        )  # fmt: skip
    if isinstance(asked, list):
        said = [*objects(asked, "prompt", where), {"role": "assistant", "content": answers["chosen"]}]
        [made] = chat(replace(record, fields={**record.fields, "messages": said}), context)
    else:
        shows = find(record, (*IMAGE_FIELDS, *AUDIO_FIELDS)) is not None  # a pair may be about text alone
        media = context.media_of(record) if shows else []
        user = Message("user", (*media, TextPart(text(asked, "question", where))))
        made = Conversation((user, Message("assistant", (TextPart(answers["chosen"]),))), context.id(record), where)
    yield replace(made, meta={**made.meta, "rejected": answers["rejected"]})


def _answer(found: Any, name: str, where: str) -> str:
    """A text, or one assistant message (in a list of one, as TRL has it)."""
    if isinstance(found, list):
        messages = objects(found, name, where)
        if len(messages) != 1 or messages[0].get("role") != "assistant":
            raise DataError(
                f"{name} holds {len(messages)} messages", where=where,
                remedy="write one assistant message; what both answers follow belongs into prompt", kind="wrong-type",
            )  # fmt: skip
        found = messages[0].get("content")
        if isinstance(found, list):
            parts = objects(found, f"content of {name}", where)
            if any(p.get("type") != "text" for p in parts):
                raise DataError(f"{name} holds a part that is no text", where=where, kind="wrong-type")
            found = "".join(text(p.get("text"), f"text of {name}", where) for p in parts)
    words = text(found, name, where)
    if not words.strip():
        raise DataError(
            f"the {name} answer is empty", where=where, remedy="write it or remove the sample", kind="empty-answer"
        )
    return words
