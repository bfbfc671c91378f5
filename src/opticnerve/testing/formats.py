"""What a format of data promises (`opticnerve.data.formats.base.DataFormat`)."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
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
from opticnerve.testing.contract import ContractError
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
        context = Context("example", folder)
        broken = [problem for rule in _RULES for problem in rule(format, context)]
    if broken:
        raise ContractError(f"{getattr(format, 'name', type(format).__name__)}:\n- " + "\n- ".join(broken))


def _read(format: DataFormat, record: Mapping[str, Any], context: Context) -> list[Conversation]:
    fields = Fields(dict(record))
    found = list(conversations(Record(fields, "example", 0, Location(0, 0, 1)), fields, format, context))
    for conversation in found:
        check_conversation(conversation)
    if found:
        check_unread(fields, format=format.name, strict=True, media=len(found[0].pieces))
    return found


def _says_what_it_is(format: DataFormat, context: Context) -> Iterator[str]:
    for name in ("name", "wants", "example"):
        if not getattr(format, name, None):
            yield f"it has no {name}: a format says how it is called, which fields it wants, and gives examples"


def _knows_its_own(format: DataFormat, context: Context) -> Iterator[str]:
    for number, record in enumerate(getattr(format, "example", ())):
        if not format.fits(dict(record)):
            yield f"example {number} does not fit: `fits` knows a record of the format by its fields"
        others = [n for n in data_formats if n != format.name and format_of(n).fits(dict(record))]
        if others:
            yield f"example {number} fits {', '.join(others)}, too: then `format` would have to be named each time"
    if format.fits({}):
        yield "it fits a record without a field: it would take every file for its own"


def _reads_its_examples(format: DataFormat, context: Context) -> Iterator[str]:
    for number, record in enumerate(getattr(format, "example", ())):
        before = copy.deepcopy(dict(record))
        try:
            first, again = (_read(format, record, context) for _ in range(2))
        except DataError as e:
            yield f"example {number} is refused: {e}"
            continue
        if not first:
            yield f"example {number} gives no sample"
        if first != again:
            yield f"example {number} reads otherwise the second time: a sample is a function of its record"
        if dict(record) != before:
            yield f"example {number} was changed by reading it"


def _refuses_in_words(format: DataFormat, context: Context) -> Iterator[str]:
    for number, record in enumerate(getattr(format, "example", ())):
        for key in record:
            for value in _HURT:
                try:
                    _read(format, {**copy.deepcopy(dict(record)), key: value}, context)
                except DataError:
                    continue
                except Exception as e:  # whatever it is, users would get a traceback
                    yield f"example {number} with {key}: {value!r} raises {type(e).__name__} ({e}), not a DataError"
                    break


def _passes_no_picture_over(format: DataFormat, context: Context) -> Iterator[str]:
    for number, record in enumerate(getattr(format, "example", ())):
        try:
            _read(format, {**copy.deepcopy(dict(record)), _UNKNOWN: "3.png"}, context)
        except DataError:
            continue
        yield f"example {number} with {_UNKNOWN}: 3.png is read: a picture that nobody uses is an error"


def _can_be_converted(format: DataFormat, context: Context) -> Iterator[str]:
    chat, preference = format_of("chat"), format_of("preference")
    for number, record in enumerate(getattr(format, "example", ())):
        try:
            before = _read(format, record, context)
        except DataError:
            continue  # told already
        if not before:
            continue  # this, too
        out = context.media / f"{format.name}-{number}.jsonl"
        convert(before, out)
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        after = [c for row in rows for c in _read(preference if "chosen" in row else chat, row, context)]
        if [c.messages for c in after] != [c.messages for c in before]:
            yield f"example {number} is another conversation once it has been converted to chat records"


_RULES = (
    _says_what_it_is,
    _knows_its_own,
    _reads_its_examples,
    _refuses_in_words,
    _passes_no_picture_over,
    _can_be_converted,
)
