"""A data file as a stream of records, each with its place, and any one of them by its place.

`where` is for people: `file.jsonl:12`, `file.csv:12`, `file.json[12]`, `folder[12]`, `shard.tar[key]`. `place` is for
`at`, which reads that one record again. Nothing is loaded whole. A bad record comes out as a `DataError` between the
good ones; a file that cannot be read at all raises.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from opticnerve.data.sources.pread import Handles
from opticnerve.types import DataError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
CSV_SUFFIXES = (".csv", ".tsv")


class Location(NamedTuple):
    """Where a record lies: in which of the source's files, from which byte (or row) on, and how many bytes it has."""

    file: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a data file. `index` is the number that `where` shows: a line (from 1) or a position (from 0)."""

    fields: dict[str, Any]
    where: str
    index: int
    place: Location


class DamagedShard(DataError):
    """What ends a shard before its time: nothing behind it can be read."""


class Records(Protocol):
    """The records of a file, a folder or some shards. `files`: what is read, for their contents to be recognised."""

    files: list[Path]

    def __iter__(self) -> Iterator[Record | DataError]:
        """All records in their order; blank lines are passed over."""
        ...

    def at(self, place: Location, index: int) -> Record:
        """The record of that place and index once more.

        Raises:
            DataError: it is no longer what it was.
        """
        ...


class JsonLines:
    """A record a line."""

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, [path]
        self._handles = Handles(self.files)

    def __iter__(self) -> Iterator[Record | DataError]:
        # Bytes, not text: a line that is not UTF-8 must not take the following ones with it.
        start = 0
        with self.path.open("rb") as file:
            for line, raw in enumerate(file, start=1):
                try:
                    if (record := self._record(raw, line, start)) is not None:
                        yield record
                except DataError as e:
                    yield e
                start += len(raw)

    def at(self, place: Location, index: int) -> Record:
        found = self._record(self._handles.read(*place), index, place.start)
        if found is None:
            raise changed(self.path)
        return found

    def _record(self, raw: bytes, line: int, start: int) -> Record | None:
        where = f"{self.path}:{line}"
        try:
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as e:
            raise not_utf8(where, start + e.start, raw[e.start]) from e
        if not text.strip():
            return None
        return record_of(parse(text, self.path, line), where, line, Location(0, start, len(raw)))


def parse(text: str, path: Path, line: int | None) -> Any:
    """JSON → Python. `line`: where in the file `text` stands if it is one line of it."""
    try:
        return json.loads(text, object_pairs_hook=no_key_twice)
    except json.JSONDecodeError as e:
        raise bad_json(f"{path}:{line or e.lineno}:{e.colno}", e.msg) from e
    except (RecursionError, ValueError) as e:  # nested too deep; a number of thousands of digits
        raise bad_json(f"{path}:{line}" if line else str(path), str(e)) from e


class Twice(ValueError):
    """A key that stands twice in one object: which of the two is meant, nobody knows."""


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json`'s `object_pairs_hook`."""
    made = dict(pairs)
    if len(made) != len(pairs):
        name = next(n for n, count in Counter(n for n, _ in pairs).items() if count > 1)
        raise Twice(f"the key {name[:60]!r} stands twice in one object")
    return made


def record_of(entry: Any, where: str, index: int, place: Location) -> Record:
    if not isinstance(entry, dict):
        raise DataError(f"a record is a JSON object {{…}}, this is {type(entry).__name__}", where=where, kind="json")
    return Record(entry, where, index, place)


def bad_json(where: str, reason: str) -> DataError:
    return DataError(f"not valid JSON: {reason}", where=where, remedy="correct or delete the line", kind="json")


def not_utf8(where: str, offset: int | None, byte: int) -> DataError:
    at = "" if offset is None else f" at byte {offset:,} of the file"
    return DataError(f"not UTF-8: byte 0x{byte:02x}{at}", where=where, remedy="save it as UTF-8", kind="encoding")


def changed(path: Path) -> DataError:
    return DataError(
        "the file has changed since it was indexed", where=str(path), remedy="start again", kind="changed-file"
    )


@dataclass(frozen=True)
class Streaming:
    """What a recipe says of a streamed entry. `subset`, `split` and `revision` choose within a data set of the hub."""

    subset: str | None = None
    split: str = "train"
    revision: str | None = None

    def chooses(self) -> bool:
        return (self.subset, self.split, self.revision) != (None, "train", None)


class ShardSource(Protocol):
    """Some shards, by number. `names`: what each is called; `tells`: what shows that it has changed."""

    names: list[str]
    tells: list[str]

    def rows(self, shard: int, start: int) -> Iterator[Record | DataError]:
        """The rows of a shard from row `start` on. One that cannot be used is a `DataError` in its place; where the
        shard itself is damaged, that is its last row, a `DamagedShard`.

        Raises:
            OpticNerveError: the shard could not be reached: nothing is known of what is in it.
        """
        ...
