"""What a conversation must be so that something can be learned from it, and the repairs that a data entry may ask for
by name (`repair: [fold-system]`): they make another conversation to learn from, and are never done unasked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise

from opticnerve.data.formats.names import first_tag
from opticnerve.data.media.files import errors_at
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
    with errors_at(conversation.where):
        for number, message in enumerate(conversation.messages):
            _check_text(message)
            if message.role == "system" and number > 0:
                raise _refused(
                    "misplaced-system", "a system message stands after another message",
                    "there is one system message, and it comes first",
                )  # fmt: skip
        _check_turns([m for m in conversation.messages if m.role != "system"])


def _check_turns(turns: list[Message]) -> None:
    if not any(m.role == "assistant" for m in turns):
        problem = "there is no assistant turn, so there is nothing to learn from"
        raise _refused("no-assistant-turn", problem, "add the answer or remove the sample")
    if turns[0].role == "assistant":
        raise _refused("assistant-first", "the assistant speaks first", "begin with a user turn")
    if not any(m.role == "assistant" and m.learn for m in turns):
        raise _refused(
            "no-assistant-turn", "no assistant turn is to be learned",
            "remove the sample, or the flag (weight, loss, train) that says so",
        )  # fmt: skip
    for number, (before, after) in enumerate(pairwise(turns), start=1):
        if before.role == after.role:
            problem = f"two {after.role} turns in a row (turns {number} and {number + 1})"
            raise _refused(
                f"two-{after.role}-turns", problem, "join them into one, or put the missing turn between them"
            )
    for number, turn in enumerate(turns, start=1):
        _check_content(turn, number)
    if turns[-1].role == "user":
        remedy = "add the assistant's answer or remove the turn"
        raise _refused("unanswered-question", "the last user turn has no answer", remedy)


def _check_text(message: Message) -> None:
    for part in message.parts:
        if not isinstance(part, TextPart):
            continue
        if (tag := first_tag(part.text)) is not None:
            raise _refused(
                "placeholder-without-image",
                f"the {message.role}'s text holds the characters {tag[:80]!r}, which stand for a picture or sound",
                'remove them; where a picture belongs, write a part {"type": "image", "image": "file.jpg"}, '
                "or the tag in the user's words and the file under image",
            )
        try:
            part.text.encode()
        except UnicodeEncodeError as e:
            bad = f"\\u{ord(part.text[e.start]):04x}"
            problem = f"the {message.role}'s text holds half a surrogate pair ({bad}), which is no character"
            raise _refused("encoding", problem, "remove the broken character") from e


def _check_content(turn: Message, number: int) -> None:
    if turn.role == "assistant":
        if any(isinstance(p, ImagePart) for p in turn.parts):
            problem = f"the assistant's turn {number} holds a picture; only text can be answered"
            raise _refused("image-in-answer", problem, "move the picture to the user's turn")
        if not turn.text.strip():
            problem = f"the assistant's answer (turn {number}) is empty"
            raise _refused("empty-answer", problem, "write the answer or remove the sample")
    elif not turn.text.strip() and all(isinstance(p, TextPart) for p in turn.parts):
        problem = f"the user's turn {number} is empty"
        raise _refused("empty-question", problem, "write the question or remove the sample")


def _refused(kind: str, problem: str, remedy: str) -> DataError:
    return DataError(problem, remedy=remedy, kind=kind)


def fold_system(conversation: Conversation) -> Conversation:
    """The system's words at the head of the first user turn, for chat templates that know no system turn (Gemma's own
    way with them: two line breaks between)."""
    messages = conversation.messages
    if len(messages) < 2 or messages[0].role != "system" or messages[1].role != "user":
        return conversation
    system, user, *rest = messages
    head = (TextPart(system.text.rstrip() + "\n\n"),) if system.text.strip() else ()
    return replace(conversation, messages=(replace(user, parts=(*head, *user.parts)), *rest))


REPAIRS: dict[str, Callable[[Conversation], Conversation]] = {"fold-system": fold_system}


def repaired(conversation: Conversation, names: Iterable[str]) -> Conversation:
    """A conversation with these repairs, in the order given."""
    for name in names:
        conversation = REPAIRS[name](conversation)
    return conversation
