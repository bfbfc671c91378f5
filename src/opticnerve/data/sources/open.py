"""The records of a path, whatever kind of file or folder it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from opticnerve.data.sources.arrow import ParquetTables
from opticnerve.data.sources.base import CSV_SUFFIXES, JSONL_SUFFIXES, JsonLines, Record, Records
from opticnerve.data.sources.csv_rows import Csv
from opticnerve.data.sources.folders import open_folder
from opticnerve.data.sources.json_list import open_json
from opticnerve.data.sources.webdataset import Shards, is_shards
from opticnerve.types import DataError


def open_records(path: Path, format: str = "auto", split: str | None = None) -> Records:
    """The records of a path, which may be a pattern of shards.

    Args:
        split: which of a folder's splits.

    Raises:
        DataError: the file is missing, or of an unknown suffix; a folder of several splits, of which none is named.
    """
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
        return open_folder(path, split, open_records)
    if split not in (None, "train"):  # one file is what is trained on
        raise DataError(
            f"hub_split names the split {split!r}, and this is one file", where=str(path), remedy="leave hub_split out",
            kind="format",
        )  # fmt: skip
    if suffix == ".parquet":
        return ParquetTables(path, [path])
    if suffix in JSONL_SUFFIXES:
        return JsonLines(path)
    if suffix in CSV_SUFFIXES:
        return Csv(path)
    if suffix == ".json":
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
