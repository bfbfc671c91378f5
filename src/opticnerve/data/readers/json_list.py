"""A JSON list of records, read an item at a time: a file of a gigabyte on one line takes a few megabytes."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from opticnerve.data.readers.handles import Handles
from opticnerve.data.readers.records import Place, Record, bad_json, not_utf8, parse, record_of
from opticnerve.types import DataError

CHUNK = 1 << 20
_BOM = codecs.BOM_UTF8
_SPACE = re.compile(r"[ \t\n\r]*")
_NEAR = 64
"""An error so near the end of what has been read may be for want of the rest: longer than any literal."""
_WHOLE = 64 << 20
"""What is no list is parsed whole up to this size, to say what it is instead."""


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
                    yield record_of(entry, f"{self.path}[{index}]", index, Place(0, start, size))
                except DataError as e:
                    yield e

    def at(self, place: Place, index: int) -> Record:
        where = f"{self.path}[{index}]"
        try:
            entry = json.loads(self._handles.read(*place))
        except ValueError as e:
            raise bad_json(where, str(e)) from e
        return record_of(entry, where, index, place)

    def _refuse(self) -> None:
        """Nothing in it, or something else than a list."""
        if self.path.stat().st_size > _WHOLE:
            seen = "something else"
        else:
            raw = self.path.read_bytes().removeprefix(_BOM)
            try:
                text = raw.decode()
            except UnicodeDecodeError as e:
                line = raw.count(b"\n", 0, e.start) + 1
                raise not_utf8(f"{self.path}:{line}", e.start, raw[e.start]) from e
            if not text.strip():
                return
            entries = parse(text, self.path, line=None)
            names = ", ".join(list(entries)[:12]) if isinstance(entries, dict) else ""
            seen = f"an object with the keys {names}" if isinstance(entries, dict) else type(entries).__name__
        raise DataError(
            f"wanted a JSON list of records, found {seen}",
            where=str(self.path),
            remedy="put the records in a list, or one to a line in a .jsonl file",
            kind="json",
        )


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
        self._move(self.at + 1)
        if self.next_sign() != "]":
            while True:
                value, end = self._value()
                start = self.byte
                self._move(end)
                yield value, start, self.byte - start
                sign = self.next_sign()
                if sign == "]":
                    break
                if sign != ",":
                    raise self._error("Expecting ',' delimiter")
                self._move(self.at + 1)
                self.next_sign()
        self._move(self.at + 1)
        if self.next_sign():
            raise self._error("Extra data")

    def next_sign(self) -> str:
        """The next character that is no white space, which is passed over; '' at the end."""
        while True:
            self._move(_SPACE.match(self.text, self.at).end())  # type: ignore[union-attr]
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
                    self._move(e.pos)
                    raise self._error(e.msg) from e
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

    def _move(self, to: int) -> None:
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


_DECODER = json.JSONDecoder()
