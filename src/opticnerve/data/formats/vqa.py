"""Questions about pictures: `{"image": "1.jpg", "question": "what shape?", "answer": "circle"}`; about sound: `audio`.

Optional: `answers` (all accepted ones: strings, or VQAv2's `{"answer": …}`), `choices` or `options` (`choices`), `type`
(or `answer_type`, `question_type`), `system`, `id`. `Conversation.meta` carries `{"answers": […], "type": …}`, and
`choices` where there are some, to evaluation. With `answers` alone the most frequent one, the first of equals, is what
is learned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from opticnerve.data.formats.captions import with_media
from opticnerve.data.formats.choices import choices_of, chosen, lettered
from opticnerve.data.formats.fields import Fields, find, missing, take, text
from opticnerve.data.formats.media import Context
from opticnerve.data.formats.turns import conversation, said
from opticnerve.data.media.audio import audio_digest
from opticnerve.data.media.open import image_digest
from opticnerve.data.sources.base import Record
from opticnerve.types import Conversation, DataError, Message, TextPart

TYPE_FIELDS = ("type", "answer_type", "question_type")


def vqa(record: Record, context: Context) -> Iterator[Conversation]:
    """One conversation of one question and one answer."""
    fields, where = Fields.of(record), record.where
    question = text(take(fields, ("question",), "question", where), "question", where)
    given, shown = choices_of(fields, where)
    choices = [text(c, "entry of choices", where) for c in given]
    if choices:
        answer = chosen(take(fields, ("answer",), "answer", where), given, where)
        accepted = [answer]
    else:
        answer, accepted = _answers(fields, where)
    meta = {"answers": accepted, "type": find(fields, TYPE_FIELDS), **({"choices": choices} if choices else {})}
    turns = [said("user", lettered(question, choices) if shown else question), said("assistant", answer, tags=False)]
    yield with_media(conversation(fields, turns, context, where, context.id(record), meta), fields)


def group_by_image(conversations: Iterable[Conversation]) -> Iterator[Conversation]:
    """All questions on the same picture(s) as one conversation, which shows them once.

    The questions need not stand together in the file, so their text is held in memory until the file ends; groups come
    in the order of their first questions and carry its id and place. `meta["turns"]` holds each question's own meta.
    """
    groups: dict[tuple[Any, ...], list[Conversation]] = {}
    for member in conversations:
        pictures = (p.source if isinstance(p.source, Path) else image_digest(p.source) for p in member.images)
        sounds = (a.source if isinstance(a.source, Path) else audio_digest(a.source) for a in member.audios)
        key = (*pictures, *sounds)
        groups.setdefault(key, []).append(member)
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


def _answers(fields: Fields, where: str) -> tuple[str, list[str]]:
    several = find(fields, ("answers",))
    if several is not None and not isinstance(several, list):
        raise DataError("answers is not a list", where=where, kind="wrong-type")
    accepted = [text(a.get("answer") if isinstance(a, dict) else a, "entry of answers", where) for a in several or []]
    single = find(fields, ("answer",))
    if single is not None:
        answer = text(single, "answer", where)
        return answer, accepted or [answer]
    if not accepted:
        raise missing(fields, ("answer", "answers"), "answer", where)
    return Counter(accepted).most_common(1)[0][0], accepted
