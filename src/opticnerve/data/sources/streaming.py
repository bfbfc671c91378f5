"""Data read as they come, shard after shard, without an index: for what is too large to be brought here first.

`streaming: true` in a recipe. Local files go through the readers that they always have; a data set of the hub, or a
folder that is laid out as one, through `datasets` (`streaming=True`): nothing is downloaded whole, and no code is run.
A place in a stream is (shard, row). Parquet says where row 1,000 lies, to a group of rows; of other formats going on
there means reading the shard up to it. Of a cloud's files (`s3://…`), Parquet is read where it lies, and of other
formats a shard is here for as long as it is read.

Rows come raw from Arrow, as in `sources.tables`: pictures stay encoded. Of formats other than Parquet each shard is a
stream of `datasets` of its own, so that a damaged one costs what is in it alone, and every error names its file and
row. `huggingface_hub` and `datasets` try again by themselves when the network fails (`datasets` 20 times, 5 seconds
apart); beyond that the shard is opened again here, `TRIES` times at one place, and then the run stops: what could not
be fetched is not a bad sample.
"""

from __future__ import annotations

import re
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from opticnerve.common import hub
from opticnerve.data.media.cloud import in_cloud
from opticnerve.data.sources.base import (
    CSV_SUFFIXES,
    JSONL_SUFFIXES,
    DamagedShard,
    Location,
    Record,
    ShardSource,
    Streaming,
    refused,
)
from opticnerve.data.sources.cloud import CloudFiles, for_a_while
from opticnerve.data.sources.open import open_records
from opticnerve.data.sources.paths import matching
from opticnerve.data.sources.tables import BATCH, batches, rows_of, saved_by_datasets
from opticnerve.data.sources.webdataset import is_shards, sample_of
from opticnerve.types import DataError, OpticNerveError

TRIES, PAUSE = 3, 5.0
"""How often a shard is opened again at one place when the network fails, and the first pause (seconds); it doubles."""
_NETWORK = {*hub.NETWORK, "huggingface_hub", "aiobotocore", "botocore", "gcsfs", "google", "azure"}
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
        """As `ShardSource.rows`; a record without an id is called by its shard and row, many shards have a row 12."""
        stem = self.shards.names[shard].rpartition("/")[2].partition(".")[0]
        for item in self.shards.rows(shard, start):
            if isinstance(item, Record) and item.fields.get("id") in (None, ""):
                item.fields["id"] = f"{stem}-{item.index}"
            yield item

    def at(self, place: Location, index: int) -> Record:
        raise refused(self.path, "a stream has no index to read single rows by", "")


class CloudShards:
    """Files in a cloud."""

    def __init__(self, path: str) -> None:
        found = CloudFiles(path)
        scheme = path.partition("://")[0]
        self.names = [f"{scheme}://{name.lstrip('/')}" for name in found.states]
        self.tells = [f"{name} {state}" for name, state in found.states.items()]

    def rows(self, shard: int, start: int) -> Iterator[Record | DataError]:
        name = self.names[shard]
        if name.endswith(".parquet"):
            yield from read_rows(name, shard, start, _of_parquet, None)
            return
        with for_a_while(name) as file:
            for item in LocalShards([file]).rows(0, start):
                where = item.where.replace(str(file), name)
                if isinstance(item, Record):
                    yield replace(item, where=where, place=Location(shard, *item.place[1:]))
                else:
                    yield type(item)(item.problem, where=where, remedy=item.remedy, kind=item.kind)


class LocalShards:
    """Files on this machine."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.names = [str(file) for file in files]
        self.tells = [f"{f.name} {f.stat().st_size if f.exists() else 'missing'}" for f in files]

    def rows(self, shard: int, start: int) -> Iterator[Record | DataError]:
        at, file = 0, self.files[shard]
        if file.suffix.lower() == ".parquet":
            yield from read_rows(str(file), shard, start, _of_parquet, None)
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
            problem = "a folder saved by datasets is mapped, not loaded: there is nothing to stream"
            raise refused(path, problem, "leave streaming out")
        return HubShards(path, given)
    if not place.exists() and is_hub_name(path):
        return HubShards(path, given)
    if given.chooses():
        problem = "subset, hub_split and revision choose within a data set of the hub, and this is a file"
        raise refused(path, problem, "leave them out")
    found: CloudShards | LocalShards
    if in_cloud(path):
        found = CloudShards(path)
    else:
        found = LocalShards(files := matching(path))
        if not any(file.exists() for file in files):
            problem = "no such data file, and no name of a data set on the hub (owner/name)"
            raise refused(path, problem, "check the path", "missing-file")
    strange = [f for f in map(Path, found.names) if not (is_shards(f) or f.suffix.lower() in _SUFFIXES)]
    if strange:
        problem = f"cannot tell what kind of data file {strange[0].name} is"
        raise refused(path, problem, f"stream {', '.join(_SUFFIXES)} or .tar")
    return found


class HubShards:
    """The shards of one split of a data set on the hub, or of a folder laid out as one."""

    def __init__(self, path: str, given: Streaming) -> None:
        import datasets  # type: ignore[import-untyped]

        self.path = path
        try:
            builder = datasets.load_dataset_builder(path, given.subset, revision=given.revision)
            self._stream = builder.as_streaming_dataset(split=given.split)
        except Exception as e:  # as in `read_rows`
            name = f"{path}@{given.revision}" if given.revision else path
            if found := hub.explain(e, name, kind="data set"):
                raise refused(path, found.problem, found.remedy, "missing-file") from e
            if not damaged(e):
                raise
            if not Path(path).exists() and (found := hub.refusal(name)):
                raise refused(path, found.problem, found.remedy, "missing-file") from e
            remedy = "check path, subset, hub_split and revision"
            raise refused(path, f"datasets cannot stream it: {_brief(e)}", remedy, "missing-file") from e
        files = (builder.config.data_files or {}).get(given.split, [])
        count = self._stream.num_shards
        # A file is a shard, for all that datasets reads itself; elsewhere the number must do.
        named = [str(f) for f in files] if len(files) == count else [f"{path} shard {n}" for n in range(count)]
        self.names = named
        self.tells = [name.rpartition("datasets/")[2] if "://" in name else name.rpartition("/")[2] for name in named]

    def rows(self, shard: int, start: int) -> Iterator[Record | DataError]:
        return read_rows(self.names[shard], shard, start, self._tables, self._stream.features)

    def _tables(self, name: str, shard: int, start: int, size: int) -> Iterator[tuple[int, Any]]:
        if name.endswith(".parquet"):
            yield from batches(name, start)
            return
        at = 0
        # Not `for row in stream`: in a data loader's worker that would take the worker's share of the shards alone.
        for table in self._stream.shard(self._stream.num_shards, shard).with_format("arrow").iter(batch_size=size):
            if at + table.num_rows > start:
                yield max(at, start), table.slice(max(0, start - at))
            at += table.num_rows


def _of_parquet(name: str, shard: int, start: int, size: int) -> Iterator[tuple[int, Any]]:
    return batches(name, start)


Tables = Callable[[str, int, int, int], Iterator[tuple[int, Any]]]


def read_rows(
    name: str, shard: int, start: int, tables: Tables, features: Mapping[str, object] | None
) -> Iterator[Record | DataError]:
    """The rows of a shard from row `start` on, as `ShardSource` promises them.

    Args:
        tables: (name, shard, first row, rows at a time) → (number of its first row, table) from that row on.
    """
    ready, tries, size = start, 0, BATCH
    while True:
        found = tables(name, shard, ready, size)
        # Only the reading stands in a try: an error of the caller, thrown at a yield, is none of ours.
        while True:
            try:
                first, table = next(found, (0, None))
            except Exception as e:  # datasets raises what any of its readers, the network or the file system does
                problem = e
                break
            if table is None:
                return
            assert first == ready
            for row in rows_of(table, features):
                fields = _sample(row) if "__key__" in row else row
                yield Record(fields, f"{name}[{ready}]", ready, Location(shard, ready, 1))
                ready, tries = ready + 1, 0
        if lost(problem):
            tries += 1
            if tries > TRIES:
                raise OpticNerveError(
                    f"{name}[{ready}]: the stream broke off, {TRIES} times again at this place: {_brief(problem)}. "
                    f"When it can be reached, go on with --resume: the checkpoints are whole",
                    kind="network",
                ) from problem
            time.sleep(PAUSE * 2 ** (tries - 1))
        elif not damaged(problem):
            raise problem
        elif size > 1 and not name.endswith(".parquet"):
            size = 1  # what of a batch came before the damage is still to be had
        else:
            says = f"the shard is damaged from here on: {_brief(problem)}"
            yield DamagedShard(says, where=f"{name}[{ready}]", remedy="get it again", kind="shard")
            return


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    """A webdataset sample's members as fields, by the rules of `sources.webdataset`."""
    given, text = row.pop("json", None), row.get("txt")
    fields: dict[str, Any] = dict(given) if isinstance(given, dict) else {}
    return sample_of(fields, row.items(), None if text is None else str(text).strip(), row["__key__"])


def lost(error: BaseException) -> bool:
    """Whether it is the network that failed, and not what came over it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionError | TimeoutError) or type(seen).__module__.partition(".")[0] in _NETWORK:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def damaged(error: BaseException) -> bool:
    """Whether it is what a file holds (or that there is none) that failed."""
    import pyarrow as pa  # type: ignore[import-untyped]
    from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]

    kinds = (OSError, ValueError, EOFError, tarfile.TarError, zlib.error, pa.ArrowException, DatasetsError)
    other_columns = isinstance(error, TypeError) and str(error).startswith("Couldn't cast")  # datasets' own
    return other_columns or isinstance(error, kinds)


def _brief(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:300]
