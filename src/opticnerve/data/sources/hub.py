"""Data sets of the hub, streamed by `datasets` (`streaming=True`): nothing is downloaded whole, and no code is run.

Rows come raw from Arrow, as in `readers.tables`: pictures stay encoded. Parquet, which most data sets are, is read by
`readers.groups`; of other formats each shard is a stream of `datasets` of its own, so that a damaged one costs what is
in it alone, and every error names its file and row. `huggingface_hub` and `datasets` try again by themselves when the
network fails (`datasets` 20 times, 5 seconds apart); beyond that the shard is opened again here, `TRIES` times at one
place, and then the run stops: what could not be fetched is not a bad sample.
"""

from __future__ import annotations

import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opticnerve.common import hub
from opticnerve.data.sources.base import DamagedShard, Location, Record
from opticnerve.data.sources.parquet import BATCH, batches, rows_of
from opticnerve.data.sources.webdataset import PICTURES, SOUNDS
from opticnerve.types import DataError, OpticNerveError

if TYPE_CHECKING:
    from opticnerve.data.sources.base import Streaming

TRIES, PAUSE = 3, 5.0
"""How often a shard is opened again at one place when the network fails, and the first pause (seconds); it doubles."""
_NETWORK = {*hub.NETWORK, "huggingface_hub"}


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
                raise DataError(found.problem, where=path, remedy=found.remedy, kind="missing-file") from e
            if not damaged(e):
                raise
            if not Path(path).exists() and (found := hub.refusal(name)):
                raise DataError(found.problem, where=path, remedy=found.remedy, kind="missing-file") from e
            remedy = "check path, subset, hub_split and revision"
            raise DataError(
                f"datasets cannot stream it: {_brief(e)}", where=path, remedy=remedy, kind="missing-file"
            ) from e
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


Tables = Callable[[str, int, int, int], Iterator[tuple[int, Any]]]


def read_rows(name: str, shard: int, start: int, tables: Tables, features: Any) -> Iterator[Record | DataError]:
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
                    f"When it can be reached, go on with --resume: the checkpoints are whole"
                ) from problem
            time.sleep(PAUSE * 2 ** (tries - 1))
        elif not damaged(problem):
            raise problem
        elif size > 1 and not name.endswith(".parquet"):
            size = 1  # what of a batch came before the damage is still to be had
        else:
            yield DamagedShard(
                f"the shard is damaged from here on: {_brief(problem)}",
                where=f"{name}[{ready}]",
                remedy="get it again",
                kind="shard",
            )
            return


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    """A webdataset sample's members as fields, by the rules of `readers.shards`."""
    given = row.pop("json", None)
    fields: dict[str, Any] = dict(given) if isinstance(given, dict) else {}
    media: dict[str, list[Any]] = {"image": [], "audio": []}
    for name, member in sorted(row.items()):
        kind = name.rpartition(".")[2].lower()
        if member is not None and (kind in PICTURES or kind in SOUNDS):
            media["image" if kind in PICTURES else "audio"].append(member)
    for kind, found in media.items():
        if found:
            fields.pop(f"{kind}s", None)
            fields[kind] = found[0] if len(found) == 1 else found
    text = row.get("txt")
    if text is not None and not {"caption", "captions", "text", "conversations", "messages"} & fields.keys():
        fields["caption"] = str(text).strip()
    fields.setdefault("id", row["__key__"])
    return fields


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
