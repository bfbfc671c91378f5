"""What a .json file may be: a list of records, records a line, or an object that holds them (`json_object`).

A list is read an item at a time: a file of a gigabyte on one line takes a few megabytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from opticnerve.data.sources.base import (
    Handles,
    JsonLines,
    Location,
    Record,
    Records,
    Twice,
    bad_json,
    parse,
    record_of,
)
from opticnerve.data.sources.json_object import WHOLE, open_object, refused_as, text_of
from opticnerve.data.sources.json_text import JsonText, lines_of
from opticnerve.types import DataError

_OF_RECORDS = {"messages", "conversations", "question", "caption", "captions", "chosen", "completion"}


def open_json(path: Path) -> Records:
    """The records of a .json file (or of one that is called .jsonl), by how it begins."""
    with path.open("rb") as file:
        lines = lines_of(file, WHOLE)
        first = next(lines, b"")
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
    return open_object(path)


class JsonList:
    """The items of one list."""

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, [path]
        self._handles = Handles(self.files)

    def __iter__(self) -> Iterator[Record | DataError]:
        with self.path.open("rb") as file:
            text = JsonText(file, self.path)
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
        large = self.path.stat().st_size > WHOLE
        if not large and not (text := text_of(self.path)).strip():
            return
        raise refused_as(self.path, "something else" if large else type(parse(text, self.path, line=None)).__name__)
