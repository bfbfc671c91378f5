"""A window on a JSON file that moves on with what is read: a file of a gigabyte on one line takes a few megabytes."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from opticnerve.data.sources.base import Twice, bad_json, no_key_twice, not_utf8
from opticnerve.types import DataError

CHUNK = 1 << 20
BOM = codecs.BOM_UTF8
_SPACE = re.compile(r"[ \t\n\r]*")
_NEAR = 64
"""An error so near the end of what has been read may be for want of the rest: longer than any literal."""


def lines_of(file: BinaryIO, most: int) -> Iterator[bytes]:
    """A file's lines that are not blank, without the spaces around them; of one longer than `most` bytes, pieces."""
    lines = (line.removeprefix(BOM).strip() for line in iter(lambda: file.readline(most), b""))
    return filter(None, lines)


class JsonText:
    """A window on a file's text, which moves on with what is read.

    `text[at]` is the next character; it is byte `byte` of the file, and stands at `line` and `column`, both from 1.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.at, self.ended = "", 0, False
        self.byte, self.line, self.column = 0, 1, 1
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._read = 0
        if file.read(len(BOM)) == BOM:
            self.byte = self._read = len(BOM)
        else:
            file.seek(0)

    def items(self, *, whole: bool = True) -> Iterator[tuple[Any, int, int]]:
        """(value, first byte, bytes) of each item. Errors are those of `json.loads` on the whole file, which ends with
        the list if it is the `whole` of it."""
        self._advance(self.at + 1)
        if self.next_sign() != "]":
            while True:
                value, end = self._value()
                start = self.byte
                self._advance(end)
                yield value, start, self.byte - start
                if self._ends("]"):
                    break
        self._advance(self.at + 1)
        if whole and self.next_sign():
            raise self._error("Extra data")

    def members(self) -> Iterator[tuple[str, int]]:
        """(key, first byte of the key) of each member of an object. Behind each stands its value, which is still to be
        taken: by `items`, where it begins with a bracket, or by `value`."""
        self._advance(self.at + 1)
        if self.next_sign() != "}":
            while True:
                start = self.byte
                key = self.value()
                if not isinstance(key, str):
                    raise self._error("Expecting property name enclosed in double quotes")
                if self.next_sign() != ":":
                    raise self._error("Expecting ':' delimiter")
                self._advance(self.at + 1)
                self.next_sign()
                yield key, start
                if self._ends("}"):
                    break
        self._advance(self.at + 1)
        if self.next_sign():
            raise self._error("Extra data")

    def _ends(self, bracket: str) -> bool:
        """Whether that is all, behind an item or member; if not, the comma is passed over."""
        sign = self.next_sign()
        if sign not in (bracket, ","):
            raise self._error("Expecting ',' delimiter")
        if sign == ",":
            self._advance(self.at + 1)
            self.next_sign()
        return sign == bracket

    def value(self) -> Any:
        """The next value, which is taken; one with a key that stands twice is a `Twice`."""
        found, end = self._value()
        self._advance(end)
        return found

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
