"""What a .json file may be: a list of records, records a line, or COCO's captions.

A list is read an item at a time: a file of a gigabyte on one line takes a few megabytes.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from opticnerve.data.sources.base import (
    Handles,
    JsonLines,
    Location,
    Record,
    Records,
    Twice,
    bad_json,
    no_key_twice,
    not_utf8,
    parse,
    record_of,
    refused,
)
from opticnerve.types import DataError

CHUNK = 1 << 20
_BOM = codecs.BOM_UTF8
_SPACE = re.compile(r"[ \t\n\r]*")
_NEAR = 64
"""An error so near the end of what has been read may be for want of the rest: longer than any literal."""
_MOST_COCO = 1 << 30
_WHOLE = 64 << 20
"""What is no list is parsed whole up to this size, to say what it is instead."""


_OF_RECORDS = {"messages", "conversations", "question", "caption", "captions", "chosen", "completion"}


def open_json(path: Path) -> Records:
    """The records of a .json file, by how it begins."""
    with path.open("rb") as file:
        lines = (line.removeprefix(_BOM).strip() for line in iter(lambda: file.readline(_WHOLE), b""))
        first = next(filter(None, lines), b"")
        if not first.startswith(b"{"):
            return JsonList(path)
        several = any(lines)
    try:
        found = json.loads(first)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and (several or found.keys() & _OF_RECORDS):
        return JsonLines(path)
    if several and found is None and first.endswith(b"}"):  # the first of some lines is broken
        return JsonLines(path)
    return CocoCaptions(path)


class JsonList:
    """The items of one list."""

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, [path]
        self._handles = Handles(self.files)

    def __iter__(self) -> Iterator[Record | DataError]:
        with self.path.open("rb") as file:
            text = _Text(file, self.path)
            if text.next_sign() != "[":
                self._refuse()
                return
            for index, (entry, start, size) in enumerate(text.items()):
                try:
                    if isinstance(entry, Twice):
                        raise bad_json(f"{self.path}[{index}]", str(entry))
                    yield record_of(entry, f"{self.path}[{index}]", index, Location(0, start, size))
                except DataError as e:
                    yield e

    def at(self, place: Location, index: int) -> Record:
        where = f"{self.path}[{index}]"
        try:
            entry = json.loads(self._handles.read(*place))
        except ValueError as e:
            raise bad_json(where, str(e)) from e
        return record_of(entry, where, index, place)

    def _refuse(self) -> None:
        """Nothing in it, or something else than a list."""
        large = self.path.stat().st_size > _WHOLE
        if not large and not (text := _text_of(self.path)).strip():
            return
        raise _no_records(self.path, "something else" if large else type(parse(text, self.path, line=None)).__name__)


class CocoCaptions:
    """COCO's captions (cocodataset.org/#format-data): `images` with `id` and `file_name`, `annotations` with `image_id`
    and `caption`. Each annotation is a record; the file is held in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, [path]
        self._rows: list[dict[str, Any] | DataError] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": []}

    def __iter__(self) -> Iterator[Record | DataError]:
        for index in range(len(self._read())):
            try:
                yield self.at(Location(0, index, 1), index)
            except DataError as e:
                yield e

    def at(self, place: Location, index: int) -> Record:
        row = self._read()[place.start]
        if isinstance(row, DataError):
            raise row
        return Record(row, f"{self.path}[{index}]", index, place)

    def _read(self) -> list[dict[str, Any] | DataError]:
        if self._rows:
            return self._rows
        if self.path.stat().st_size > _MOST_COCO:
            raise _no_records(self.path, f"an object of more than {_MOST_COCO >> 20:,} MiB")
        found = parse(_text_of(self.path), self.path, line=None)
        images, notes = (found.get(k) for k in ("images", "annotations"))
        listed = all(isinstance(v, list) and all(isinstance(x, dict) for x in v) for v in (images, notes))
        if not listed or not any("caption" in a for a in notes):
            raise _no_records(self.path, f"an object with the keys {', '.join(list(found)[:12])}")
        names: dict[str, Any] = {}
        for image in images:
            own = str(image.get("id"))
            if names.setdefault(own, image.get("file_name")) != image.get("file_name"):
                raise DataError(f"two images have the id {own}", where=str(self.path), kind="json")
        self._rows = [_annotation(a, names, f"{self.path}[{n}]") for n, a in enumerate(notes)]
        return self._rows


def _annotation(note: dict[str, Any], names: dict[str, Any], where: str) -> dict[str, Any] | DataError:
    own = note.get("image_id")
    if names.get(str(own)) is None:
        problem = f"the annotation's image_id {str(own)[:60]} is none of the images with a file_name"
        return DataError(problem, where=where, remedy="correct or remove it", kind="missing-field")
    fields = {k: v for k, v in note.items() if k not in ("image_id", "id")}
    return fields | {"file_name": names[str(own)]} | ({"id": note["id"]} if note.get("id") is not None else {})


def _text_of(path: Path) -> str:
    raw = path.read_bytes().removeprefix(_BOM)
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise not_utf8(f"{path}:{line}", e.start, raw[e.start]) from e


def _no_records(path: Path, found: str) -> DataError:
    problem = f"wanted a JSON list of records, found {found}"
    return refused(path, problem, "put the records in a list, or one to a line", "json")


class _Text:
    """A window on a file's text, which moves on with what is read.

    `text[at]` is the next character; it is byte `byte` of the file, and stands at `line` and `column`, both from 1.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.at, self.ended = "", 0, False
        self.byte, self.line, self.column = 0, 1, 1
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._read = 0
        if file.read(len(_BOM)) == _BOM:
            self.byte = self._read = len(_BOM)
        else:
            file.seek(0)

    def items(self) -> Iterator[tuple[Any, int, int]]:
        """(value, first byte, bytes) of each item. Errors are those of `json.loads` on the whole file."""
        self._advance(self.at + 1)
        if self.next_sign() != "]":
            while True:
                value, end = self._value()
                start = self.byte
                self._advance(end)
                yield value, start, self.byte - start
                sign = self.next_sign()
                if sign == "]":
                    break
                if sign != ",":
                    raise self._error("Expecting ',' delimiter")
                self._advance(self.at + 1)
                self.next_sign()
        self._advance(self.at + 1)
        if self.next_sign():
            raise self._error("Extra data")

    def next_sign(self) -> str:
        """The next character that is no white space, which is passed over; '' at the end."""
        while True:
            self._advance(_SPACE.match(self.text, self.at).end())  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self._more()

    def _value(self) -> tuple[Any, int]:
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as e:
                cut = e.msg.startswith("Unterminated string") or e.pos > len(self.text) - _NEAR
                if self.ended or not cut:
                    self._advance(e.pos)
                    raise self._error(e.msg) from e
            except Twice as e:
                # Where it ends is known to who does not mind.
                return e, _PLAIN.raw_decode(self.text, self.at)[1]
            except (RecursionError, ValueError) as e:  # nested too deep; a number of thousands of digits
                raise bad_json(f"{self.path}:{self.line}", str(e)) from e
            else:
                if self.ended or end + 2 < len(self.text):  # else a number may go on: 1 | .5, 1e- | 5
                    return value, end
            self._more()

    def _more(self) -> None:
        """As much again as is waiting: an item of any size is tried a logarithmic number of times."""
        waiting = self.text[self.at :]
        raw = self.file.read(max(CHUNK, len(waiting)))
        pending = len(self._decoder.getstate()[0])
        try:
            self.text, self.at = waiting + self._decoder.decode(raw, final=not raw), 0
        except UnicodeDecodeError as e:
            line = self.line + waiting.count("\n") + e.object.count(b"\n", 0, e.start)
            raise not_utf8(f"{self.path}:{line}", self._read - pending + e.start, e.object[e.start]) from e
        self._read += len(raw)
        self.ended = not raw

    def _advance(self, to: int) -> None:
        passed = self.text[self.at : to]
        self.byte += len(passed) if passed.isascii() else len(passed.encode())
        if lines := passed.count("\n"):
            self.line += lines
            self.column = len(passed) - passed.rfind("\n")
        else:
            self.column += len(passed)
        self.at = to

    def _error(self, reason: str) -> DataError:
        return bad_json(f"{self.path}:{self.line}:{self.column}", reason)


_DECODER = json.JSONDecoder(object_pairs_hook=no_key_twice)
_PLAIN = json.JSONDecoder()
