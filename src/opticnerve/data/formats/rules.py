"""What a conversation must be so that something can be learned from it."""

from __future__ import annotations

from itertools import pairwise

from opticnerve.data.formats.names import first_tag
from opticnerve.types import Conversation, DataError, ImagePart, Message, TextPart


def check_conversation(conversation: Conversation) -> None:
    """Raises a `DataError` of a kind of its own for each way in which a conversation is not one to learn from.

    - `misplaced-system`: a system message anywhere but first.
    - `no-assistant-turn`: there is no answer to learn; `unanswered-question`: the last question has none.
    - `assistant-first`, `two-assistant-turns`, `two-user-turns`: turns do not alternate, beginning with the user.
    - `empty-answer`, `empty-question`: a turn with nothing in it.
    - `image-in-answer`: the assistant cannot be taught to draw.
    - `placeholder-without-image`: `<image>`, `<video>`, `[IMG]` and the like as plain text: a picture is missing.
    - `encoding`: half of a surrogate pair, which no tokenizer can take.
    """
    where = conversation.where
    for place, message in enumerate(conversation.messages):
        _check_text(message, where)
        if message.role == "system" and place > 0:
            raise DataError(
                "a system message stands after another message",
                where=where,
                remedy="there is one system message, and it comes first",
                kind="misplaced-system",
            )
    turns = [m for m in conversation.messages if m.role != "system"]
    if not any(m.role == "assistant" for m in turns):
        raise DataError(
            "there is no assistant turn, so there is nothing to learn from",
            where=where,
            remedy="add the answer or remove the sample",
            kind="no-assistant-turn",
        )
    if turns[0].role == "assistant":
        raise DataError(
            "the assistant speaks first", where=where, remedy="begin with a user turn", kind="assistant-first"
        )
    if not any(m.role == "assistant" and m.learn for m in turns):
        raise DataError(
            "no assistant turn is to be learned",
            where=where,
            remedy="remove the sample, or the flag (weight, loss, train) that says so",
            kind="no-assistant-turn",
        )
    for number, (before, after) in enumerate(pairwise(turns), start=1):
        if before.role == after.role:
            raise DataError(
                f"two {after.role} turns in a row (turns {number} and {number + 1})",
                where=where,
                remedy="join them into one, or put the missing turn between them",
                kind=f"two-{after.role}-turns",
            )
    for number, turn in enumerate(turns, start=1):
        _check_content(turn, number, where)
    if turns[-1].role == "user":
        raise DataError(
            "the last user turn has no answer",
            where=where,
            remedy="add the assistant's answer or remove the turn",
            kind="unanswered-question",
        )


def _check_text(message: Message, where: str) -> None:
    for part in message.parts:
        if not isinstance(part, TextPart):
            continue
        if (tag := first_tag(part.text)) is not None:
            raise DataError(
                f"the {message.role}'s text holds the characters {tag[:80]!r}, which stand for a picture or sound",
                where=where,
                remedy='remove them; where a picture belongs, write a part {"type": "image", "image": "file.jpg"}, '
                "or the tag in the user's words and the file under image",
                kind="placeholder-without-image",
            )
        try:
            part.text.encode()
        except UnicodeEncodeError as e:
            bad = f"\\u{ord(part.text[e.start]):04x}"
            raise DataError(
                f"the {message.role}'s text holds half a surrogate pair ({bad}), which is no character",
                where=where,
                remedy="remove the broken character",
                kind="encoding",
            ) from e


def _check_content(turn: Message, number: int, where: str) -> None:
    if turn.role == "assistant":
        if any(isinstance(p, ImagePart) for p in turn.parts):
            raise DataError(
                f"the assistant's turn {number} holds a picture; only text can be answered",
                where=where,
                remedy="move the picture to the user's turn",
                kind="image-in-answer",
            )
        if not turn.text.strip():
            raise DataError(
                f"the assistant's answer (turn {number}) is empty",
                where=where,
                remedy="write the answer or remove the sample",
                kind="empty-answer",
            )
    elif not turn.text.strip() and all(isinstance(p, TextPart) for p in turn.parts):
        raise DataError(
            f"the user's turn {number} is empty",
            where=where,
            remedy="write the question or remove the sample",
            kind="empty-question",
        )
