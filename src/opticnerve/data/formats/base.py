"""What a format of records is: a class with a name, the fields that it wants, how it knows a record of its own, and how
it reads one.

The built-in ones lie in `questions`, `dialogs` and `preferences`. Another package adds its own by entry point
(`[project.entry-points."opticnerve.data_formats"]`), and checks it with `opticnerve.testing.check_format`:

    class Riddles(DataFormat):
        name = "riddle"
        wants = "a picture, riddle and solution"
        example = ({"image": "1.png", "riddle": "what is red?", "solution": "the circle"},)

        def fits(self, record):
            return has(record, "riddle") and has(record, "solution")

        def samples(self, fields, context, id):
            words = text(take(fields, ("riddle",), "riddle"), "riddle")
            answer = text(take(fields, ("solution",), "solution"), "solution")
            yield id, [said("user", words), said("assistant", answer, tags=False)], {}

Media, flags and tags are everybody's: `turns.conversation` finds them, whatever the format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from opticnerve.data.formats.fields import Fields
from opticnerve.data.formats.media import Context
from opticnerve.data.formats.names import kind_by_name, kind_of
from opticnerve.data.formats.turns import Turn

Sample = tuple[str, Sequence[Turn], dict[str, Any]]
"""Id, turns and meta of a conversation."""


class DataFormat:
    """One way to write samples down.

    `wants`: its fields, for people. `example`: records of it, whose pictures are `1.png` and `2.png`. `needs_media`: a
    sample without a picture or a sound is an error, unless `may_be_blind` and a field for one is there and empty.
    `takes_prompt`: a data entry's `prompt` is for it.
    """

    name: ClassVar[str]
    wants: ClassVar[str]
    example: ClassVar[Sequence[Mapping[str, Any]]]
    needs_media: ClassVar[bool] = False
    may_be_blind: ClassVar[bool] = False
    takes_prompt: ClassVar[bool] = False

    def fits(self, record: dict[str, Any]) -> bool:
        """Whether a record has the fields of this format, and is more likely of it than of another."""
        raise NotImplementedError

    def samples(self, fields: Fields, context: Context, id: str) -> Iterator[Sample]:
        """The samples of a record; whatever is looked up in `fields` counts as used.

        Raises:
            DataError: the record is not as the format says.
        """
        raise NotImplementedError


def has(record: dict[str, Any], *names: str) -> bool:
    """Whether one of these fields is there and not null; nothing is noted as read."""
    return any(dict.get(record, name) is not None for name in names)


def about(record: dict[str, Any]) -> bool:
    """Whether a field names media by its own name."""
    return any(kind_by_name(k) and kind_of(k, v) for k, v in dict.items(record) if isinstance(k, str))
