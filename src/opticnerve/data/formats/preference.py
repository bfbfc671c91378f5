"""Which of two answers people prefer: `{"image": "1.jpg", "question": "what shape?", "chosen": "a circle", "rejected":
"a dog"}`, or TRL's form, where `prompt`, `chosen` and `rejected` are chat messages.

The conversation ends with the chosen answer; `Conversation.meta["rejected"]` holds the words of the other one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opticnerve.data.formats.chat import words_or_turns
from opticnerve.data.formats.fields import Fields, take, text
from opticnerve.data.formats.media import Context
from opticnerve.data.formats.turns import conversation, said, turns_of
from opticnerve.data.sources.base import Record
from opticnerve.types import Conversation, DataError, TextPart

PROMPT_FIELDS = ("prompt", "question")


def preference(record: Record, context: Context) -> Iterator[Conversation]:
    """One conversation a record."""
    fields, where = Fields.of(record), record.where
    asked = words_or_turns(take(fields, PROMPT_FIELDS, "question", where), "user", "prompt", context, where)
    answers = {
        name: _answer(take(fields, (name,), f"{name} answer", where), name, context, where)
        for name in ("chosen", "rejected")
    }
    if answers["chosen"].strip() == answers["rejected"].strip():
        raise DataError(
            "the chosen and the rejected answer are the same", where=where, remedy="remove the sample",
            kind="same-answers",
        )  # fmt: skip
    turns = [*asked, said("assistant", answers["chosen"], tags=False)]
    yield conversation(fields, turns, context, where, context.id(record), {"rejected": answers["rejected"]})


def _answer(found: Any, name: str, context: Context, where: str) -> str:
    """A text, or one assistant message (in a list of one, as TRL has it)."""
    if isinstance(found, list):
        turns = turns_of(found, name, context, where)
        if len(turns) != 1 or turns[0].role != "assistant":
            raise DataError(
                f"{name} holds {len(turns)} messages", where=where,
                remedy="write one assistant message; what both answers follow belongs into prompt", kind="wrong-type",
            )  # fmt: skip
        if not turns[0].learn:
            raise DataError(f"{name} is not to be learned", where=where, remedy="remove the sample", kind="weight")
        if not all(isinstance(p, TextPart) for p in turns[0].pieces):
            raise DataError(f"{name} holds a part that is no text", where=where, kind="wrong-type")
        found = "".join(p.text for p in turns[0].pieces if isinstance(p, TextPart))
    words = text(found, name, where)
    if not words.strip():
        raise DataError(
            f"the {name} answer is empty", where=where, remedy="write it or remove the sample", kind="empty-answer"
        )
    return words
