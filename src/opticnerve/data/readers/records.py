"""A data file as a stream of records, each with its place, and any one of them by its place.

`where` is for people: `file.jsonl:12`, `file.csv:12`, `file.json[12]`, `folder[12]`, `shard.tar[key]`. `place` is for
`at`, which reads that one record again. Nothing is loaded whole. A bad record comes out as a `DataError` between the
good ones; a file that cannot be read at all raises.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from opticnerve.data.readers.handles import Handles
from opticnerve.types import DataError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
CSV_SUFFIXES = (".csv", ".tsv")


class Place(NamedTuple):
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
    place: Place


class DamagedShard(DataError):
    """What ends a shard before its time: nothing behind it can be read."""


class Records(Protocol):
    """The records of a file, a folder or some shards. `files`: what is read, for their contents to be recognised."""

    files: list[Path]

    def __iter__(self) -> Iterator[Record | DataError]:
        """All records in their order; blank lines are passed over."""
        ...

    def at(self, place: Place, index: int) -> Record:
        """The record of that place and index once more.

        Raises:
            DataError: it is no longer what it was.
        """
        ...


def open_records(path: Path, format: str = "auto", split: str | None = None) -> Records:
    """The records of a path, which may be a pattern of shards.

    Args:
        split: which of a folder's splits.

    Raises:
        DataError: the file is missing, or of an unknown suffix; a folder of several splits, of which none is named.
    """
    from opticnerve.data.readers.shards import Shards, is_shards

    if format == "webdataset" or is_shards(path):
        return Shards(path, split)
    if not path.exists():
        remedy = "check the path"
        if format == "hf" and not path.is_absolute():
            remedy += "; a data set on the hub is read with streaming: true, or downloaded first and its folder named"
        raise DataError("no such data file or folder", where=str(path), remedy=remedy, kind="missing-file")
    if not os.access(path, os.R_OK):
        raise DataError("no permission to read it", where=str(path), remedy="chmod u+r", kind="missing-file")
    suffix = path.suffix.lower()
    if path.is_dir():
        from opticnerve.data.readers.folders import open_folder

        return open_folder(path, split)
    if split not in (None, "train"):  # one file is what is trained on
        raise DataError(
            f"hub_split names the split {split!r}, and this is one file", where=str(path), remedy="leave hub_split out",
            kind="format",
        )  # fmt: skip
    if suffix == ".parquet":
        from opticnerve.data.readers.tables import ParquetTables

        return ParquetTables(path, [path])
    if suffix in JSONL_SUFFIXES:
        return JsonLines(path)
    if suffix in CSV_SUFFIXES:
        from opticnerve.data.readers.csv_rows import Csv

        return Csv(path)
    if suffix == ".json":
        from opticnerve.data.readers.json_list import open_json

        return open_json(path)
    raise DataError(
        f"cannot tell what kind of data file {suffix or 'a file without a suffix'!r} is",
        where=str(path),
        remedy="use .json, .jsonl, .csv, .tsv, .parquet, .tar, or a folder saved by datasets",
        kind="format",
    )


def records(path: Path) -> Iterator[Record | DataError]:
    """The records of a path in their order.

    Raises:
        DataError: as `open_records`; or the file (a JSON list, Parquet) cannot be parsed.
    """
    return iter(open_records(path))


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

    def at(self, place: Place, index: int) -> Record:
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
        return record_of(parse(text, self.path, line), where, line, Place(0, start, len(raw)))


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


def record_of(entry: Any, where: str, index: int, place: Place) -> Record:
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
