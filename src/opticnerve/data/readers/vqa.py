"""Questions about pictures: `{"image": "1.jpg", "question": "what shape?", "answer": "circle"}`; about sound: `audio`.

Optional: `answers` (all accepted ones: strings, or VQAv2's `{"answer": …}`), `choices` (a list, of which `answer` names
one, or its place counted from 0), `type` (or `answer_type`, `question_type`), `id`. `Conversation.meta` carries
`{"answers": […], "type": …}`, and `choices` where there are some, to evaluation. With `answers` alone the most frequent
one, the first of equals, is what is learned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from opticnerve.data.audio import audio_digest
from opticnerve.data.images import image_digest
from opticnerve.data.readers.fields import Context, find, missing, take, text
from opticnerve.data.readers.records import Record
from opticnerve.types import Conversation, DataError, Message, TextPart

TYPE_FIELDS = ("type", "answer_type", "question_type")


def vqa(record: Record, context: Context) -> Iterator[Conversation]:
    """One conversation of one question and one answer."""
    where = record.where
    question = text(take(record, ("question",), "question"), "question", where)
    choices = _choices(record)
    answer, accepted = _answers(record) if not choices else _chosen(record, choices)
    media = context.media_of(record)
    messages = (Message("user", (*media, TextPart(question))), Message("assistant", (TextPart(answer),)))
    meta = {"answers": accepted, "type": find(record, TYPE_FIELDS), **({"choices": choices} if choices else {})}
    yield Conversation(messages, context.id(record), where, meta)


def group_by_image(conversations: Iterable[Conversation]) -> Iterator[Conversation]:
    """All questions on the same picture(s) as one conversation, which shows them once.

    The questions need not stand together in the file, so their text is held in memory until the file ends; groups come
    in the order of their first questions and carry its id and place. `meta["turns"]` holds each question's own meta.
    """
    groups: dict[tuple[Any, ...], list[Conversation]] = {}
    for conversation in conversations:
        pictures = (p.source if isinstance(p.source, Path) else image_digest(p.source) for p in conversation.images)
        sounds = (a.source if isinstance(a.source, Path) else audio_digest(a.source) for a in conversation.audios)
        key = (*pictures, *sounds)
        groups.setdefault(key, []).append(conversation)
    yield from map(merged, groups.values())


def merged(members: Sequence[Conversation]) -> Conversation:
    """The questions of all members as the turns of one conversation, which shows the first one's pictures."""
    first = members[0]
    messages = list(first.messages)
    for later in members[1:]:
        user, assistant = later.messages
        messages += [Message("user", (TextPart(user.text),)), assistant]
    return Conversation(tuple(messages), first.id, first.where, {"turns": [m.meta for m in members]})


def _choices(record: Record) -> list[str]:
    found = record.fields.get("choices")
    if found is None:
        return []
    if not isinstance(found, list) or len(found) < 2:
        raise DataError("choices is not a list of two or more", where=record.where, kind="wrong-type")
    return [text(c, "entry of choices", record.where) for c in found]


def _chosen(record: Record, choices: list[str]) -> tuple[str, list[str]]:
    """The right choice, which `answer` names by its words or by its place."""
    named = take(record, ("answer",), "answer")
    if str(named) in choices:
        return str(named), [str(named)]
    if isinstance(named, int) and not isinstance(named, bool) and 0 <= named < len(choices):
        return choices[named], [choices[named]]
    raise DataError(
        f"the answer {named!r} is none of the {len(choices)} choices", where=record.where,
        remedy=f"write one of {', '.join(choices[:8])}, or its place, 0 to {len(choices) - 1}", kind="choices",
    )  # fmt: skip


def _answers(record: Record) -> tuple[str, list[str]]:
    several = record.fields.get("answers")
    if several is not None and not isinstance(several, list):
        raise DataError("answers is not a list", where=record.where, kind="wrong-type")
    accepted = [
        text(a.get("answer") if isinstance(a, dict) else a, "entry of answers", record.where) for a in several or []
    ]
    single = record.fields.get("answer")
    if single is not None:
        answer = text(single, "answer", record.where)
        return answer, accepted or [answer]
    if not accepted:
        raise missing(record.fields, ("answer", "answers"), "answer", record.where)
    return Counter(accepted).most_common(1)[0][0], accepted
