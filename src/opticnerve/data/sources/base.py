"""A data file as a stream of records, each with its place, and any one of them by its place.

`where` is for people: `file.jsonl:12`, `file.csv:12`, `file.json[12]`, `folder[12]`, `shard.tar[key]`. `place` is for
`at`, which reads that one record again. Nothing is loaded whole. A bad record comes out as a `DataError` between the
good ones; a file that cannot be read at all raises.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from opticnerve.types import DataError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
CSV_SUFFIXES = (".csv", ".tsv")
_MOST_OPEN = 32


class Location(NamedTuple):
    """Where a record lies: in which of the source's files, from which byte (or row) on, and how many bytes it has."""

    file: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a data file. `index` is the number that `where` shows: a line (from 1) or a position (from 0).
    `repaired`: the repairs that reading it took."""

    fields: dict[str, Any]
    where: str
    index: int
    place: Location
    repaired: tuple[str, ...] = ()


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


class Handles:
    """Some files, each opened when it is first read; a few dozen stay open.

    `pread` moves no cursor, so that processes which share a handle by fork do not disturb each other; a copy that is
    pickled opens its own.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self._open: dict[int, int] = {}
        self._sizes: dict[int, tuple[int, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        for handle in self._open.values():
            os.close(handle)

    def read(self, file: int, start: int, size: int) -> bytes:
        """`size` bytes from byte `start` on.

        Raises:
            DataError: the file is gone, shorter, or another than when it was first opened.
        """
        try:
            raw = os.pread(self._handle(file), size, start)
            while len(raw) < size and (more := os.pread(self._handle(file), size - len(raw), start + len(raw))):
                raw += more
        except OSError as e:
            raise self._unreadable(file, e.strerror or str(e)) from e
        if len(raw) < size:
            raise self._unreadable(file, f"it ends after {start + len(raw):,} of {start + size:,} bytes")
        return raw

    def _handle(self, file: int) -> int:
        if file not in self._open:
            while len(self._open) >= _MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            handle = os.open(self.files[file], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            seen = os.fstat(handle)
            if self._sizes.setdefault(file, (seen.st_size, seen.st_mtime_ns)) != (seen.st_size, seen.st_mtime_ns):
                os.close(handle)
                raise self._unreadable(file, "it has changed since it was first opened; start again")
            self._open[file] = handle
        return self._open[file]

    def _unreadable(self, file: int, reason: str) -> DataError:
        return DataError(f"cannot be read any more: {reason}", where=str(self.files[file]), kind="changed-file")


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


def record_of(entry: object, where: str, index: int, place: Location) -> Record:
    if not isinstance(entry, dict):
        raise DataError(f"a record is a JSON object {{…}}, this is {type(entry).__name__}", where=where, kind="json")
    return Record(entry, where, index, place)


def bad_json(where: str, reason: str) -> DataError:
    return DataError(f"not valid JSON: {reason}", where=where, remedy="correct or delete the line", kind="json")


def not_utf8(where: str, offset: int | None, byte: int) -> DataError:
    at = "" if offset is None else f" at byte {offset:,} of the file"
    return DataError(f"not UTF-8: byte 0x{byte:02x}{at}", where=where, remedy="save it as UTF-8", kind="encoding")


def refused(path: Path | str, problem: str, remedy: str, kind: str = "format") -> DataError:
    """A file or folder that cannot be read at all."""
    return DataError(problem, where=str(path), remedy=remedy, kind=kind)


def changed(path: Path) -> DataError:
    return refused(path, "the file has changed since it was indexed", "start again", "changed-file")


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
