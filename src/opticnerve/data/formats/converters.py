"""The formats of records, each by the fields that it reads; whatever they say of media and turns, `turns` reads.

- `captions`: `{"image": "1.jpg", "caption": "a red circle"}`: the user shows the picture, the model says it. The
  caption: `caption`, `captions`, `text` or `comment`, the first found; the latter two only where no question or answer
  stands beside them. A list of captions makes one sample each, with ids `…#0`, `…#1`. `prompt`: what the user says.
- `vqa`: `{"image": "1.jpg", "question": "what shape?", "answer": "circle"}`. Optional: `answers` (all accepted ones:
  strings, or VQAv2's `{"answer": …}`; with them alone the most frequent one, the first of equals, is learned),
  `choices` or `options`, `type` (or `answer_type`, `question_type`). `Conversation.meta` carries
  `{"answers": […], "type": …}`, and `choices` where there are some, to evaluation.
- `chat`: transformers' `{"messages": [{"role": "user", "content": [{"type": "image", "image": "1.jpg"}, …]}]}`; content
  is a string or a list of parts: `{"type": "text", "text"}`, `{"type": "image", "image"|"path"|"url"}`, OpenAI's
  `{"type": "image_url", "image_url": {"url"}}`, and the same for video and audio. LLaMA-Factory and ms-swift write
  `<image>` in the words and list the files under `images`.
- `llava`: `{"id", "image": "1.jpg" or a list, "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
  {"from": "gpt", "value": "a circle"}]}` (github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md).
- `completion`: TRL's `{"images": ["1.jpg"], "prompt": …, "completion": …}`, both texts or messages: the completion
  alone is learned.
- `preference`: `{"image": "1.jpg", "question": "what shape?", "chosen": "a circle", "rejected": "a dog"}`, or TRL's
  form, where `prompt`, `chosen` and `rejected` are chat messages. The conversation ends with the chosen answer;
  `Conversation.meta["rejected"]` holds the words of the other one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from opticnerve.data.formats.fields import Fields, brief, empty, find, missing, take, text
from opticnerve.data.formats.media import Context
from opticnerve.data.formats.turns import Turn, conversation, said, turns_of
from opticnerve.data.media.audio import audio_digest
from opticnerve.data.media.open import image_digest
from opticnerve.data.sources.base import Record
from opticnerve.types import Conversation, DataError, Message, Role, TextPart

CAPTION_FIELDS, VAGUE_FIELDS = ("caption", "captions"), ("text", "comment")
PROMPT_FIELDS, TYPE_FIELDS = ("prompt", "question"), ("type", "answer_type", "question_type")
COMPANY = (
    "question", "questions", "query", "instruction", "input", "answer", "answers", "response", "output", "label",
    "labels", "choices", "options", "chosen", "rejected", "completion", "messages", "conversations", "A",
)  # fmt: skip
"""Beside these `text` is no caption."""
_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")

Sample = tuple[str, Sequence[Turn], dict[str, Any]]
"""Id, turns and meta of a conversation."""


def conversations(record: Record, fields: Fields, format: str, context: Context) -> Iterator[Conversation]:
    """The conversations of a record; `fields`: the record's.

    Raises:
        DataError: it is not as its format says.
    """
    for id, turns, meta in CONVERTERS[format](fields, context, context.id(fields, record.index)):
        made = conversation(fields, turns, context, record.where, id, meta)
        if not made.pieces and format in ("captions", "vqa"):
            raise missing(fields, ("image", "video", "audio"), "picture")
        yield made


def _captions(fields: Fields, context: Context, id: str) -> Iterator[Sample]:
    if find(fields, CAPTION_FIELDS) is None and (beside := company(fields)):
        raise DataError(
            f"text beside {beside} is no caption", kind="unused-field",
            remedy=f"call it caption, or question and answer; or ignore: [{beside}]",
        )  # fmt: skip
    found = take(fields, (*CAPTION_FIELDS, *VAGUE_FIELDS), "caption")
    own_prompt = find(fields, ("prompt",))
    for number, caption in enumerate(found if isinstance(found, list) else [found]):
        own = f"{id}#{number}" if isinstance(found, list) else id
        prompt = context.prompt(own) if empty(own_prompt) else text(own_prompt, "prompt")
        yield own, [said("user", prompt or ""), said("assistant", text(caption, "caption"), tags=False)], {}


def company(fields: dict[str, object]) -> str | None:
    """What shows that a `text` is part of a question."""
    return next((name for name in COMPANY if not empty(dict.get(fields, name))), None)


def _vqa(fields: Fields, context: Context, id: str) -> Iterator[Sample]:
    question = text(take(fields, ("question",), "question"), "question")
    given, shown = choices_of(fields)
    choices = [text(c, "entry of choices") for c in given]
    if choices:
        answer = chosen(take(fields, ("answer",), "answer"), given)
        accepted = [answer]
    else:
        answer, accepted = _answers(fields)
    meta = {"answers": accepted, "type": find(fields, TYPE_FIELDS), **({"choices": choices} if choices else {})}
    asked = lettered(question, choices) if shown else question
    yield id, [said("user", asked), said("assistant", answer, tags=False)], meta


def _answers(fields: Fields) -> tuple[str, list[str]]:
    several = find(fields, ("answers",))
    if several is not None and not isinstance(several, list):
        raise DataError("answers is not a list", kind="wrong-type")
    accepted = [text(a.get("answer") if isinstance(a, dict) else a, "entry of answers") for a in several or []]
    single = find(fields, ("answer",))
    if single is not None:
        answer = text(single, "answer")
        return answer, accepted or [answer]
    if not accepted:
        raise missing(fields, ("answer", "answers"), "answer")
    return Counter(accepted).most_common(1)[0][0], accepted


def _turns_under(name: str) -> Callable[[Fields, Context, str], Iterator[Sample]]:
    def convert(fields: Fields, context: Context, id: str) -> Iterator[Sample]:
        yield id, turns_of(take(fields, (name,), "conversation"), name, context), {}

    return convert


def _completion(fields: Fields, context: Context, id: str) -> Iterator[Sample]:
    asked = _words_or_turns(take(fields, ("prompt",), "prompt"), "user", "prompt", context)
    for turn in asked:
        turn.learn = turn.role != "assistant"
    answer = take(fields, ("completion",), "completion")
    yield id, [*asked, *_words_or_turns(answer, "assistant", "completion", context)], {}


def _words_or_turns(value: object, role: Role, what: str, context: Context) -> list[Turn]:
    """A text, which is one turn, or messages."""
    if isinstance(value, list):
        return turns_of(value, what, context)
    return [said(role, text(value, what), tags=role != "assistant")]


def _preference(fields: Fields, context: Context, id: str) -> Iterator[Sample]:
    asked = _words_or_turns(take(fields, PROMPT_FIELDS, "question"), "user", "prompt", context)
    better, worse = (_preferred(take(fields, (n,), f"{n} answer"), n, context) for n in ("chosen", "rejected"))
    if better.strip() == worse.strip():
        problem = "the chosen and the rejected answer are the same"
        raise DataError(problem, remedy="remove the sample", kind="same-answers")
    yield id, [*asked, said("assistant", better, tags=False)], {"rejected": worse}


def _preferred(found: object, name: str, context: Context) -> str:
    """A text, or one assistant message (in a list of one, as TRL has it)."""
    if isinstance(found, list):
        turns = turns_of(found, name, context)
        if len(turns) != 1 or turns[0].role != "assistant":
            raise DataError(
                f"{name} holds {len(turns)} messages",
                remedy="write one assistant message; what both answers follow belongs into prompt", kind="wrong-type",
            )  # fmt: skip
        if not turns[0].learn:
            raise DataError(f"{name} is not to be learned", remedy="remove the sample", kind="weight")
        if not all(isinstance(p, TextPart) for p in turns[0].pieces):
            raise DataError(f"{name} holds a part that is no text", kind="wrong-type")
        found = "".join(p.text for p in turns[0].pieces if isinstance(p, TextPart))
    words = text(found, name)
    if not words.strip():
        raise DataError(f"the {name} answer is empty", remedy="write it or remove the sample", kind="empty-answer")
    return words


CONVERTERS: dict[str, Callable[[Fields, Context, str], Iterator[Sample]]] = {
    "captions": _captions, "vqa": _vqa, "llava": _turns_under("conversations"), "chat": _turns_under("messages"),
    "completion": _completion, "preference": _preference,
}  # fmt: skip


# -- which of a question's choices is the answer: by its words, its number or its letter ------------------------------


def choices_of(fields: Fields) -> tuple[list[Any], bool]:
    """A question's choices, and whether they are part of the question.

    `choices` are what answers are compared with, and the model does not see them. `options` (a list, or `{"A": …}`) and
    columns named A, B, C, … are options that the question is about.
    """
    names = [n for n in ("choices", "options") if not empty(fields.get(n))]
    letters = [c for c in ascii_uppercase if not empty(dict.get(fields, c))]
    lettered = len(letters) >= 2 and letters == list(ascii_uppercase[: len(letters)])
    if len(names) + lettered > 1:
        raise _wrong(f"the choices are given twice, as {' and '.join(names + letters[:1])}", "leave one out")
    if not names and not lettered:
        return [], False
    found: Any = fields[names[0]] if names else [fields[c] for c in letters]
    if isinstance(found, dict):
        if list(found) != list(ascii_uppercase[: len(found)]):
            keys = ", ".join(list(found)[:8])
            raise _wrong(f"{names[0]} is an object with the keys {keys}", "name them A, B, …")
        found = [found[c] for c in list(found)]
    if not isinstance(found, list) or len(found) < 2:
        raise DataError(f"{names[0] if names else 'A, B'} is not a list of two or more", kind="wrong-type")
    return found, names != ["choices"]


def chosen(answer: object, choices: list[Any]) -> str:
    """The words of the choice that `answer` names.

    A JSON number is a place, counted from 0; a text is a choice's words, or its letter.

    Raises:
        DataError: it names none, or could name two (kind `choices`).
    """
    words = [text(c, "entry of choices") for c in choices]
    found: set[str] = set()
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        raise _none(answer, words)
    if isinstance(answer, str):
        found |= {w for w in words if w.strip() == answer.strip()}
        letter = _LETTER.fullmatch(answer.strip())
        place = ascii_uppercase.index(letter[1].upper()) if letter else len(words)
    else:
        # Where the choices are numbers themselves, it may be one of them.
        found |= {words[k] for k, c in enumerate(choices) if isinstance(c, int | float) and c == answer}
        place = int(answer) if answer == answer // 1 and 0 <= answer < len(words) else len(words)
    if place < len(words):
        found.add(words[place])
    if len(found) > 1:
        raise _wrong(
            f"the answer {brief(answer)} may be the choice {' or the choice '.join(sorted(found))[:200]}",
            "write the right choice's words, and choices that are texts",
        )  # fmt: skip
    if not found:
        raise _none(answer, words)
    return found.pop()


def lettered(question: str, choices: list[str]) -> str:
    """The question with its options below it, unless it names them all."""
    if all(c in question for c in choices):
        return question
    return "\n".join([question.rstrip("\n"), *(f"{c}. {w}" for c, w in zip(ascii_uppercase, choices, strict=False))])


def _none(answer: object, words: list[str]) -> DataError:
    return _wrong(
        f"the answer {brief(answer)} is none of the {len(words)} choices",
        f"write one of {', '.join(w[:40] for w in words[:8])}; its letter; or its place as a JSON number, 0 to "
        f"{len(words) - 1}",
    )


def _wrong(problem: str, remedy: str) -> DataError:
    return DataError(problem, remedy=remedy, kind="choices")


# -- questions on the same picture ------------------------------------------------------------------------------------


def group_by_image(conversations: Iterable[Conversation]) -> Iterator[Conversation]:
    """All questions on the same picture(s) as one conversation, which shows them once.

    The questions need not stand together in the file, so their text is held in memory until the file ends; groups come
    in the order of their first questions and carry its id and place. `meta["turns"]` holds each question's own meta.
    """
    groups: dict[tuple[Any, ...], list[Conversation]] = {}
    for member in conversations:
        pictures = (p.source if isinstance(p.source, Path) else image_digest(p.source) for p in member.images)
        sounds = (a.source if isinstance(a.source, Path) else audio_digest(a.source) for a in member.audios)
        groups.setdefault((*pictures, *sounds), []).append(member)
    yield from map(merged, groups.values())


def merged(members: Sequence[Conversation]) -> Conversation:
    """The questions of all members as the turns of one conversation, which shows the first one's pictures.

    Raises:
        DataError: their system turns differ.
    """
    first = members[0]
    messages = list(first.messages)
    for later in members[1:]:
        *system, user, assistant = later.messages
        if system != messages[: len(messages) - len(messages) // 2 * 2]:
            raise DataError(
                f"its system turn is another than that of {first.where}, which is about the same picture",
                where=later.where, remedy="leave group_by_image out", kind="misplaced-system",
            )  # fmt: skip
        messages += [Message("user", tuple(p for p in user.parts if isinstance(p, TextPart))), assistant]
    return Conversation(tuple(messages), first.id, first.where, {"turns": [m.meta for m in members]})
