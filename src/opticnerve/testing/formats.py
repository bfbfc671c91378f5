"""What a format of data promises (`opticnerve.data.formats.base.DataFormat`)."""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from opticnerve.data.dataset.convert import convert
from opticnerve.data.formats.base import DataFormat
from opticnerve.data.formats.converters import conversations, format_of
from opticnerve.data.formats.fields import Fields
from opticnerve.data.formats.media import Context
from opticnerve.data.formats.rules import check_conversation, check_unread
from opticnerve.data.sources.base import Location, Record
from opticnerve.registry import data_formats
from opticnerve.testing.contract import Broken, apply, expect
from opticnerve.types import Conversation, DataError

_HURT: tuple[object, ...] = (None, "", 0, 1.5, True, [], {}, [None], [[]], {"a": 1}, "x", ["x"])
_UNKNOWN = "thumbnail_of_it"


def check_format(make: Callable[[], DataFormat]) -> None:
    """Run a format through its contract, with the records that it gives as its `example`.

    - its examples are recognised as its own, and as no other format's; each gives samples that can be learned from;
    - a record is read the same again, and is left as it was;
    - whatever stands in one of its fields, it is read or refused with a `DataError`, never another exception;
    - a picture under a name that it does not know is refused;
    - what was read and written as chat records reads the same.

    Args:
        make: the class, or a function that makes one.

    Raises:
        ContractError: the message lists every broken promise.
    """
    format = make()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for picture, colour in (("1.png", "red"), ("2.png", "blue")):
            PIL.Image.new("RGB", (8, 8), colour).save(folder / picture)
        apply(_RULES, _Given(format, Context("example", folder)), getattr(format, "name", type(format).__name__))


@dataclass
class _Given:
    """A format, and where its examples' pictures lie."""

    format: DataFormat
    context: Context

    def examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, record in enumerate(getattr(self.format, "example", ())):
            yield f"example {number}", copy.deepcopy(dict(record))

    def read(self, record: Mapping[str, Any]) -> list[Conversation]:
        return _read(self.format, record, self.context)


def _read(format: DataFormat, record: Mapping[str, Any], context: Context) -> list[Conversation]:
    fields = Fields(dict(record))
    found = list(conversations(Record(fields, "example", 0, Location(0, 0, 1)), fields, format, context))
    for conversation in found:
        check_conversation(conversation)
    if found:
        check_unread(fields, format=format.name, strict=True, media=len(found[0].pieces))
    return found


def says_what_it_is(given: _Given) -> None:
    """A format says how it is called (`name`), which fields it wants (`wants`), and gives records (`example`)."""
    for name in ("name", "wants", "example"):
        expect(bool(getattr(given.format, name, None)), f"it has no {name}")


def knows_its_own(given: _Given) -> None:
    """`fits` knows a record of the format by its fields, and no other's: else `format` would have to be named each
    time, or every file be taken for its own."""
    for name, record in given.examples():
        expect(given.format.fits(record), f"{name} does not fit")
        others = [n for n in data_formats if n != given.format.name and format_of(n).fits(record)]
        expect(not others, f"{name} fits {', '.join(others)}, too")
    expect(not given.format.fits({}), "it fits a record without a field, and so every file")


def reads_its_examples(given: _Given) -> None:
    """A sample is a function of its record, which is left as it was; each example gives one to learn from."""
    for name, record in given.examples():
        before = copy.deepcopy(record)
        first, again = given.read(record), given.read(record)
        expect(bool(first), f"{name} gives no sample")
        expect(first == again, f"{name} reads otherwise the second time")
        expect(record == before, f"{name} was changed by reading it")


def refuses_in_words(given: _Given) -> None:
    """Whatever stands in a field, the record is read or refused with a `DataError`, or users would get a traceback."""
    for name, record in given.examples():
        for key, value in itertools.product(record, _HURT):
            try:
                given.read({**record, key: value})
            except DataError:
                continue
            except Exception as e:
                raise Broken(f"{name} with {key}: {value!r} raises {type(e).__name__} ({e})") from e


def passes_no_picture_over(given: _Given) -> None:
    """A picture that nobody uses is an error."""
    for name, record in given.examples():
        try:
            given.read({**record, _UNKNOWN: "3.png"})
        except DataError:
            continue
        raise Broken(f"{name} with {_UNKNOWN}: 3.png is read")


def can_be_converted(given: _Given) -> None:
    """What was read and written as chat records reads the same."""
    chat, preference = format_of("chat"), format_of("preference")
    for number, (name, record) in enumerate(given.examples()):
        before, out = given.read(record), given.context.media / f"{number}.jsonl"
        convert(before, out)
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        after = [c for row in rows for c in _read(preference if "chosen" in row else chat, row, given.context)]
        expect([c.messages for c in after] == [c.messages for c in before], f"{name} is another conversation then")


_RULES = (
    says_what_it_is,
    knows_its_own,
    reads_its_examples,
    refuses_in_words,
    passes_no_picture_over,
    can_be_converted,
)
