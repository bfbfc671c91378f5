"""Data read as they come, shard after shard, without an index: for what is too large to be brought here first.

`streaming: true` in a recipe. Local files go through the readers that they always have; a data set of the hub, or a
folder that is laid out as one, through `datasets` (`readers.hub`). A place in a stream is (shard, row). Parquet
says where row 1,000 lies, to a group of rows; of other formats going on there means reading the shard up to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opticnerve.data.sources.arrow import saved_by_datasets
from opticnerve.data.sources.base import (
    CSV_SUFFIXES,
    JSONL_SUFFIXES,
    DamagedShard,
    Location,
    Record,
    ShardSource,
    Streaming,
)
from opticnerve.data.sources.hub import HubShards, read_rows
from opticnerve.data.sources.open import open_records
from opticnerve.data.sources.parquet import batches
from opticnerve.data.sources.webdataset import is_shards, matching
from opticnerve.types import DataError

_SUFFIXES = (*JSONL_SUFFIXES, *CSV_SUFFIXES, ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Streamed:
    """The records of a stream, as any other's, and from any place on."""

    def __init__(self, path: str | Path, given: Streaming) -> None:
        self.path, self.files = Path(path), list[Path]()
        self.shards = _shard_source(str(path), given)

    def __len__(self) -> int:
        """Shards."""
        return len(self.shards.names)

    def __iter__(self) -> Iterator[Record | DataError]:
        for shard in range(len(self)):
            yield from self.rows(shard)

    def rows(self, shard: int, start: int = 0) -> Iterator[Record | DataError]:
        """As `ShardSource.rows`; a record without an id is called by its shard and row, for many have a row 12."""
        stem = self.shards.names[shard].rpartition("/")[2].partition(".")[0]
        for item in self.shards.rows(shard, start):
            if isinstance(item, Record) and item.fields.get("id") in (None, ""):
                item.fields["id"] = f"{stem}-{item.index}"
            yield item

    def at(self, place: Location, index: int) -> Record:
        raise DataError("a stream has no index to read single rows by", where=str(self.path), kind="format")


class LocalShards:
    """Files on this machine."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.names = [str(file) for file in files]
        self.tells = [f"{f.name} {f.stat().st_size if f.exists() else 'missing'}" for f in files]

    def rows(self, shard: int, start: int) -> Iterator[Record | DataError]:
        at, file = 0, self.files[shard]
        if file.suffix.lower() == ".parquet":
            yield from read_rows(str(file), shard, start, lambda name, _, first, __: batches(name, first), None)
            return
        found: Iterator[Any] | None = None
        while True:
            try:
                found = iter(open_records(file)) if found is None else found
                item = next(found, None)
            except DataError as e:
                if at >= start:  # else it has been told: a place behind the damage is the shard's end
                    where = e.where if e.where != str(file) else f"{file}[{at}]"
                    yield DamagedShard(e.problem, where=where, remedy=e.remedy, kind=e.kind)
                return
            if item is None:
                return
            at += 1
            if at > start:
                yield item


def is_hub_name(path: str) -> bool:
    """Whether a path that is not there could be a data set of the hub."""
    return bool(_HUB_NAME.fullmatch(path)) and not path.lower().endswith((*_SUFFIXES, ".tar", ".tgz", ".gz"))


def _shard_source(path: str, given: Streaming) -> ShardSource:
    place = Path(path)
    if place.is_dir():
        if saved_by_datasets(place):
            raise DataError(
                "a folder saved by datasets is mapped, not loaded: there is nothing to stream",
                where=path,
                remedy="leave streaming out",
                kind="format",
            )
        return HubShards(path, given)
    if not place.exists() and is_hub_name(path):
        return HubShards(path, given)
    if given.chooses():
        raise DataError(
            "subset, hub_split and revision choose within a data set of the hub, and this is a file",
            where=path,
            remedy="leave them out",
            kind="format",
        )
    files = matching(path)
    if not any(file.exists() for file in files):
        raise DataError(
            "no such data file, and no name of a data set on the hub (owner/name)",
            where=path,
            remedy="check the path",
            kind="missing-file",
        )
    strange = [f for f in files if not (is_shards(f) or f.suffix.lower() in _SUFFIXES)]
    if strange:
        raise DataError(
            f"cannot tell what kind of data file {strange[0].name} is",
            where=path,
            remedy=f"stream {', '.join(_SUFFIXES)} or .tar",
            kind="format",
        )
    return LocalShards(files)
