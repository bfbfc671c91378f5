"""A data file as a stream of records, each with its place: `file.jsonl:12`, `file.csv:12`, `file.json[12]`,
`folder[12]`.

JSONL, CSV and Parquet are read piece by piece; a JSON list is loaded whole. A bad record comes out as a `DataError`
between the good ones; a file that cannot be read at all raises.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opticnerve.types import DataError

JSONL_SUFFIXES = (".jsonl", ".ndjson")
CSV_SUFFIXES = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a data file. `index` is the number that `where` shows: a line (from 1) or a position (from 0)."""

    fields: dict[str, Any]
    where: str
    index: int


def records(path: Path) -> Iterator[Record | DataError]:
    """The records of a file or folder in their order; blank lines are passed over.

    Raises:
        DataError: the file is missing, of an unknown suffix, empty, or (a JSON list, Parquet) cannot be parsed.
    """
    if not path.exists():
        raise DataError("no such data file or folder", where=str(path), remedy="check the path", kind="missing-file")
    if not os.access(path, os.R_OK):
        raise DataError("no permission to read it", where=str(path), remedy="chmod u+r", kind="missing-file")
    if path.is_dir() or path.suffix.lower() == ".parquet":
        from opticnerve.data.readers.tables import table_records

        return table_records(path)
    suffix = path.suffix.lower()
    if suffix in JSONL_SUFFIXES:
        return _jsonl(path)
    if suffix in CSV_SUFFIXES:
        return _csv(path, CSV_SUFFIXES[suffix])
    if suffix == ".json":
        return _json(path)
    raise DataError(
        f"cannot tell what kind of data file {suffix or 'a file without a suffix'!r} is",
        where=str(path),
        remedy="use .json, .jsonl, .csv, .tsv, .parquet, or a folder saved by datasets",
        kind="format",
    )


def _jsonl(path: Path) -> Iterator[Record | DataError]:
    # Bytes, not text: a line that is not UTF-8 must not take the following ones with it.
    offset = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            where, start = f"{path}:{line}", offset
            offset += len(raw)
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
                if text.strip():
                    yield _record(_parse(text, path, line), where, line)
            except UnicodeDecodeError as e:
                yield _not_utf8(where, start + e.start, raw[e.start])
            except DataError as e:
                yield e


def _json(path: Path) -> Iterator[Record | DataError]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise _not_utf8(f"{path}:{line}", e.start, raw[e.start]) from e
    if not text.strip():
        return
    entries = _parse(text, path, line=None)
    if not isinstance(entries, list):
        seen = f"an object with the keys {_names(entries)}" if isinstance(entries, dict) else type(entries).__name__
        raise DataError(
            f"wanted a JSON list of records, found {seen}",
            where=str(path),
            remedy="put the records in a list, or one to a line in a .jsonl file",
            kind="json",
        )
    for index, entry in enumerate(entries):
        try:
            yield _record(entry, f"{path}[{index}]", index)
        except DataError as e:
            yield e


def _csv(path: Path, delimiter: str) -> Iterator[Record | DataError]:
    # Bytes that are not UTF-8 pass as lone surrogates, so that only the row they stand in is lost.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = rows.line_num + 1
            where = f"{path}:{line}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as e:
                error = DataError(f"not a CSV row: {e}", where=where, remedy="check quotes and line breaks", kind="csv")
                if header is None:
                    raise error from e
                yield error
                continue
            if not any(row):
                continue
            bad = next((c for cell in row for c in cell if "\udc80" <= c <= "\udcff"), None)
            if bad is not None:
                error = _not_utf8(where, None, ord(bad) - 0xDC00)
                if header is None:
                    raise error
                yield error
            elif header is None:
                header = [name.strip() for name in row]
            elif len(row) != len(header):
                yield DataError(
                    f"{len(row)} cells under {len(header)} column names ({', '.join(header)})",
                    where=where,
                    remedy="put cells that hold commas or line breaks in double quotes",
                    kind="csv",
                )
            else:
                yield Record({k: v for k, v in zip(header, row, strict=True) if v != ""}, where, line)


def _parse(text: str, path: Path, line: int | None) -> Any:
    """JSON → Python. `line`: where in the file `text` stands if it is one line of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise _bad_json(f"{path}:{line or e.lineno}:{e.colno}", e.msg) from e
    except (RecursionError, ValueError) as e:  # nested too deep; a number of thousands of digits
        raise _bad_json(f"{path}:{line}" if line else str(path), str(e)) from e


def _bad_json(where: str, reason: str) -> DataError:
    return DataError(f"not valid JSON: {reason}", where=where, remedy="correct or delete the line", kind="json")


def _record(entry: Any, where: str, index: int) -> Record:
    if not isinstance(entry, dict):
        raise DataError(f"a record is a JSON object {{…}}, this is {type(entry).__name__}", where=where, kind="json")
    return Record(entry, where, index)


def _not_utf8(where: str, offset: int | None, byte: int) -> DataError:
    at = "" if offset is None else f" at byte {offset:,} of the file"
    return DataError(f"not UTF-8: byte 0x{byte:02x}{at}", where=where, remedy="save it as UTF-8", kind="encoding")


def _names(fields: dict[str, Any]) -> str:
    return ", ".join(list(fields)[:12])
