"""From a record to its conversations, by the format that it has; and questions about one picture brought together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from opticnerve.data.formats.base import DataFormat
from opticnerve.data.formats.fields import Fields, missing
from opticnerve.data.formats.layouts import as_option, picture_by_number
from opticnerve.data.formats.media import Context
from opticnerve.data.formats.names import kind_by_name
from opticnerve.data.formats.turns import conversation
from opticnerve.data.media.audio import audio_digest
from opticnerve.data.media.open import image_digest
from opticnerve.data.sources.base import Record
from opticnerve.registry import data_formats
from opticnerve.types import Conversation, DataError, Message, TextPart


@cache
def format_of(name: str) -> DataFormat:
    """The format of that name.

    Raises:
        OpticNerveError: there is none.
    """
    made: DataFormat = data_formats.get(name, allow_dotted=False)()
    return made


def conversations(record: Record, fields: Fields, format: DataFormat, context: Context) -> Iterator[Conversation]:
    """The conversations of a record; `fields`: the record's.

    Raises:
        DataError: it is not as its format says.
    """
    for id, turns, meta in format.samples(fields, context, context.id(fields, record.index)):
        made = conversation(fields, turns, context, record.where, id, meta)
        if format.needs_media and not made.pieces:
            kept = format.may_be_blind and any(kind_by_name(k) for k, _ in fields.raw() if isinstance(k, str))
            if not kept:
                error = missing(fields, ("image", "video", "audio"), "picture")
                if by_number := picture_by_number(fields, context.media):
                    error = DataError(error.problem, remedy=f"name it with {as_option(by_number)}", kind=error.kind)
                raise error
        yield made


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
