"""What a conversation must be so that something can be learned from it, what of a record may be passed over, and the
repairs that a data entry may ask for by name (`repair: [fold-system]`): they make another conversation to learn from,
and are never done unasked.

One check for all formats, after the conversation has been made: `Fields` knows what was read. An error are fields that
name media (other media than those that were used), that change what is learned, and, where the format was told by the
fields alone, words of a question that the format has no use for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from opticnerve.data.formats.fields import Fields, empty
from opticnerve.data.formats.layouts import as_option, picture_by_number
from opticnerve.data.formats.media import ends_alike
from opticnerve.data.formats.names import (
    file_names,
    first_tag,
    kind_by_name,
    kind_by_value,
    kind_of,
    names_by_number,
)
from opticnerve.data.formats.turns import REFUSED, WEIGHTS
from opticnerve.data.media.files import errors_at, is_url
from opticnerve.types import Conversation, DataError, ImagePart, Message, TextPart

QUESTION = ("prompt", "question", "query", "instruction", "context", "hint", "choices", "options", "answer", "answers")
_PROMPTED = ("objects",)
"""What is written into the prompt elsewhere: ms-swift's boxes behind `<ref-object>` and `<bbox>`."""
_DEEPEST = 6


def check_conversation(conversation: Conversation) -> None:
    """Raises a `DataError` of a kind of its own for each way in which a conversation is not one to learn from.

    - `misplaced-system`: a system message anywhere but first.
    - `no-assistant-turn`: there is no answer to learn; `unanswered-question`: the last question has none.
    - `assistant-first`, `two-assistant-turns`, `two-user-turns`: turns do not alternate, beginning with the user.
    - `empty-answer`, `empty-question`: a turn with nothing in it.
    - `tools`: a tool's result that follows no call.
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
    for number, (before, after) in enumerate(pairwise([turns[0], *turns])):
        if after.role == "tool":
            if not before.calls and (before.role != "tool" or number == 0):
                raise _refused(
                    "tools", f"the tool's result (turn {number + 1}) follows no call",
                    "write what the assistant called under tool_calls of the turn before it",
                )  # fmt: skip
        elif before.role == after.role and number > 0:
            problem = f"two {after.role} turns in a row (turns {number} and {number + 1})"
            raise _refused(
                f"two-{after.role}-turns", problem, "join them into one, or put the missing turn between them"
            )
    for number, turn in enumerate(turns, start=1):
        _check_content(turn, number)
    if turns[-1].role != "assistant":
        remedy = "add the assistant's answer or remove the turn"
        raise _refused("unanswered-question", f"the last {turns[-1].role} turn has no answer", remedy)


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
        if not turn.text.strip() and not turn.calls:
            problem = f"the assistant's answer (turn {number}) is empty"
            raise _refused("empty-answer", problem, "write the answer or remove the sample")
    elif turn.role == "user" and not turn.text.strip() and all(isinstance(p, TextPart) for p in turn.parts):
        problem = f"the user's turn {number} is empty"
        raise _refused("empty-question", problem, "write the question or remove the sample")


def _refused(kind: str, problem: str, remedy: str) -> DataError:
    return DataError(problem, remedy=remedy, kind=kind)


# -- what a record holds and its reader did not look at ----------------------------------------------------------------


def check_unread(fields: Fields, *, format: str, strict: bool, media: int, folder: Path | None = None) -> None:
    """Raise an error (kind `unused-field`) for the first field that must not be passed over.

    Args:
        strict: words of a question are not passed over either. media: how many the conversation has. folder: where
            they are looked for, to say how a number names one.
    """
    used: set[Any] | None = None  # found where it is asked for: most records name nothing that is not read
    for path, key, value in _unread(fields, "", 0, fields.ignored):
        if kind := kind_of(key, value):
            used = set(_files_used(fields, 0)) if used is None else used
            if not _is_used(key, value, used, media, path == key):
                raise _unused(path, f"names {kind} files", value, format)
        if not media and names_by_number(key) and not empty(value):
            instead = as_option(picture_by_number(fields, folder or Path())) if path == key else ""
            raise _unused(path, "points at a picture", value, format, instead)
        if key in WEIGHTS or (key in REFUSED and path != key):
            if not empty(value):
                raise _unused(path, "may change what is learned", value, format)
        elif strict and path == key and key in QUESTION and format in ("captions", "vqa") and not empty(value):
            raise _unused(path, "belongs to the question", value, format)
    for name in _PROMPTED:
        if name not in fields.read and not empty(dict.get(fields, name)):
            instead = "boxes={style: plain}, with <bbox> in its words" if name == "objects" else ""
            raise _unused(name, "changes the prompt", fields[name], format, instead)


def _unread(fields: dict[str, Any], before: str, depth: int, ignored: frozenset[str]) -> Iterator[tuple[str, str, Any]]:
    """(path, key, value) of all that was not looked at, objects within objects too."""
    read = fields.read if isinstance(fields, Fields) else ()
    for key, value in dict.items(fields):
        if not isinstance(key, str) or (depth and key in ignored):
            continue
        path = f"{before}{key}"
        if key not in read:
            yield path, key, value
            if kind_by_value(value):  # datasets' {"bytes", "path"} is told already
                continue
        if depth < _DEEPEST:
            inner = [value] if isinstance(value, dict) else value if isinstance(value, list) else ()
            for number, item in enumerate(inner):
                if isinstance(item, dict) and (key not in read or isinstance(item, Fields)):
                    at = f"{path}[{number}]." if isinstance(value, list) else f"{path}."
                    yield from _unread(item, at, depth + 1, ignored)


def _files_used(fields: Fields, depth: int) -> Iterator[tuple[str, ...]]:
    """The files that what was read names."""
    for key, value in fields.raw():
        if key not in fields.read:
            continue
        if kind_by_name(key) or kind_by_value(value):
            yield from file_names(value)
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, Fields) and depth < _DEEPEST:
                yield from _files_used(item, depth + 1)


def _is_used(key: str, value: object, used: set[tuple[str, ...]], media: int, outside: bool) -> bool:
    """The same file again, or, `outside` of the turns or under another name than one for media, the web address that
    media at hand came from."""
    if media and (outside or kind_by_name(key) is None) and isinstance(value, str) and is_url(value):
        return True
    names = list(file_names(value))
    return bool(names) and all(any(ends_alike(name, other) for other in used) for name in names)


def _unused(path: str, does: str, value: object, format: str, instead: str = "") -> DataError:
    shown = str(value) if isinstance(value, str | int) else type(value).__name__
    return DataError(
        f"{path} ({shown[:60]}) {does}, and is not read in the format {format}", kind="unused-field",
        remedy=f"{instead or 'name it with columns, as the format has it'}; or ignore: [{path.rpartition('.')[2]}]",
    )  # fmt: skip


# -- repairs ----------------------------------------------------------------------------------------------------------


def picture_first(conversation: Conversation) -> Conversation:
    """In each turn its pictures and sounds before its words, as most models were trained."""
    messages = []
    for message in conversation.messages:
        words = [p for p in message.parts if isinstance(p, TextPart)]
        media = [p for p in message.parts if not isinstance(p, TextPart)]
        moved = (*media, *words) != message.parts
        messages.append(replace(message, parts=(*media, *words)) if moved else message)
    return replace(conversation, messages=tuple(messages)) if tuple(messages) != conversation.messages else conversation


def drop_leading_assistant(conversation: Conversation) -> Conversation:
    """Without what the assistant says before any user does."""
    first = next((n for n, m in enumerate(conversation.messages) if m.role == "user"), 0)
    kept = tuple(m for n, m in enumerate(conversation.messages) if n >= first or m.role != "assistant")
    return replace(conversation, messages=kept) if len(kept) < len(conversation.messages) else conversation


def fold_system(conversation: Conversation) -> Conversation:
    """The system's words at the head of the first user turn, for chat templates that know no system turn (Gemma's own
    way with them: two line breaks between)."""
    messages = conversation.messages
    if len(messages) < 2 or messages[0].role != "system" or messages[1].role != "user":
        return conversation
    system, user, *rest = messages
    head = (TextPart(system.text.rstrip() + "\n\n"),) if system.text.strip() else ()
    return replace(conversation, messages=(replace(user, parts=(*head, *user.parts)), *rest))


def _as_read(conversation: Conversation) -> Conversation:
    return conversation


REPAIRS: dict[str, Callable[[Conversation], Conversation]] = {
    "fold-system": fold_system, "picture-first": picture_first, "drop-leading-assistant": drop_leading_assistant,
    "close-quotes": _as_read,  # done where tables are read (`sources.csv_rows`)
}  # fmt: skip


def repaired(conversation: Conversation, names: Iterable[str], before: Iterable[str] = ()) -> Conversation:
    """A conversation with these repairs, in the order given. `meta["repaired"]` lists those that changed something,
    `before` among them: those that reading took."""
    done = list(before)
    for name in names:
        after = REPAIRS[name](conversation)
        if after is not conversation:
            done.append(name)
        conversation = after
    return replace(conversation, meta={**conversation.meta, "repaired": done}) if done else conversation
