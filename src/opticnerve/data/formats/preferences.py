"""Preference data: two answers to the same question, of which one is preferred.

`{"image": "1.jpg", "question": "what shape?", "chosen": "a circle", "rejected": "a dog"}`; TRL's form, where `prompt`,
`chosen` and `rejected` are chat messages, or where there is no `prompt` and both answers begin with it;
LLaMA-Factory's, where the question stands under `conversations` or `messages`; ms-swift's, where `messages` (or `query`
and `response`) end with the better answer and `rejected_response` (or `rejected_messages`) is the other. The
conversation ends with the chosen answer; `Conversation.meta["rejected"]` holds the words of the other one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opticnerve.data.formats.base import DataFormat, Sample, has
from opticnerve.data.formats.dialogs import history_of, words_or_turns
from opticnerve.data.formats.fields import Fields, find, take, text
from opticnerve.data.formats.media import Context
from opticnerve.data.formats.turns import Turn, said, turns_of
from opticnerve.types import DataError, TextPart

PROMPT_FIELDS = ("prompt", "question", "query")
_TURNS = ("conversations", "messages")
_WORSE = ("rejected_response", "rejected_messages")


class Preference(DataFormat):
    """A question and two answers."""

    name = "preference"
    wants = "chosen and rejected, and prompt or question"
    example = (
        {"image": "1.png", "question": "what shape?", "chosen": "a circle", "rejected": "a dog"},
        {"images": ["1.png"], "chosen": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}],
         "rejected": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "blue"}]},
        {"images": ["1.png"], "rejected_response": "blue",
         "messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]},
    )  # fmt: skip

    def fits(self, record: dict[str, Any]) -> bool:
        both = has(record, "chosen") and has(record, "rejected")
        return both or (has(record, *_WORSE) and has(record, "messages", "query"))

    def samples(self, fields: Fields, context: Context, id: str) -> Iterator[Sample]:
        if has(fields, "chosen"):
            asked, better, worse = _chosen_and_rejected(fields, context)
        else:
            asked, better, worse = _with_a_worse_answer(fields, context)
        if better.strip() == worse.strip():
            problem = "the chosen and the rejected answer are the same"
            raise DataError(problem, remedy="remove the sample", kind="same-answers")
        yield id, [*asked, said("assistant", better, tags=False)], {"rejected": worse}


def _chosen_and_rejected(fields: Fields, context: Context) -> tuple[list[Turn], str, str]:
    sides = {name: take(fields, (name,), f"{name} answer") for name in ("chosen", "rejected")}
    turns = next((n for n in _TURNS if has(fields, n)), None)
    if find(fields, PROMPT_FIELDS) is not None or turns is None:
        whole = all(isinstance(v, list) and len(v) > 1 for v in sides.values())
        if find(fields, PROMPT_FIELDS) is None and whole:
            return _shared(sides, context)
        asked = words_or_turns(take(fields, PROMPT_FIELDS, "question"), "user", "prompt", context)
    else:
        asked = turns_of(fields[turns], turns, context)
    return asked, *(_answer(value, name, context) for name, value in sides.items())  # type: ignore[return-value]


def _shared(sides: dict[str, Any], context: Context) -> tuple[list[Turn], str, str]:
    """Both answers with the whole conversation before them: TRL's implicit prompt."""
    (better, worse) = (turns_of(value, name, context) for name, value in sides.items())
    if [(t.role, t.pieces, t.calls) for t in better[:-1]] != [(t.role, t.pieces, t.calls) for t in worse[:-1]]:
        raise DataError(
            f"chosen ({len(better)} messages) and rejected ({len(worse)}) differ before their last messages",
            remedy="write what both follow under prompt, and one assistant message each", kind="wrong-type",
        )  # fmt: skip
    return better[:-1], _words(better[-1:], "chosen"), _words(worse[-1:], "rejected")


def _with_a_worse_answer(fields: Fields, context: Context) -> tuple[list[Turn], str, str]:
    if has(fields, "messages"):
        *asked, last = turns_of(fields["messages"], "messages", context) or [said("user", "")]
        better = _words([last], "messages")
    else:
        question = text(take(fields, ("query",), "question"), "query")
        asked = [*history_of(fields), said("user", question)]
        better = _answer(take(fields, ("response",), "chosen answer"), "response", context)
    worse = take(fields, _WORSE, "rejected answer")
    if isinstance(worse, list) and len(worse) > 1:
        *before, last = turns_of(worse, _WORSE[1], context)
        if [(t.role, t.pieces, t.calls) for t in before] != [(t.role, t.pieces, t.calls) for t in asked]:
            problem = f"messages ({len(asked) + 1}) and rejected_messages ({len(worse)}) differ before their last turns"
            raise DataError(problem, remedy="write the last answer alone under rejected_response", kind="wrong-type")
        return asked, better, _words([last], "rejected")
    return asked, better, _answer(worse, "rejected", context)


def _answer(found: object, name: str, context: Context) -> str:
    """A text, or one assistant message (alone, or in a list of one, as TRL has it)."""
    if isinstance(found, Fields):
        found = [found]
    if isinstance(found, list):
        return _words(turns_of(found, name, context), name)
    return _not_empty(text(found, name), name)


def _words(turns: list[Turn], name: str) -> str:
    if len(turns) != 1 or turns[0].role != "assistant":
        said_by = f"{len(turns)} messages" if len(turns) != 1 else f"a {turns[0].role}'s message"
        raise DataError(
            f"{name} holds {said_by}",
            remedy="write one assistant message; what both answers follow belongs into prompt", kind="wrong-type",
        )  # fmt: skip
    if turns[0].calls:
        raise DataError(f"{name} calls a tool, and answers are compared by their words", kind="tools")
    if not turns[0].learn:
        raise DataError(f"{name} is not to be learned", remedy="remove the sample", kind="weight")
    if not all(isinstance(p, TextPart) for p in turns[0].pieces):
        raise DataError(f"{name} holds a part that is no text", kind="wrong-type")
    return _not_empty("".join(p.text for p in turns[0].pieces if isinstance(p, TextPart)), name)


def _not_empty(words: str, name: str) -> str:
    if not words.strip():
        raise DataError(f"the {name} answer is empty", remedy="write it or remove the sample", kind="empty-answer")
    return words
