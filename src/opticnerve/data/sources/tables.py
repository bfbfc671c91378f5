"""Tables as records: a folder written by `datasets.Dataset.save_to_disk`, a Parquet file, or a folder of them.

Cells come raw from Arrow: a `datasets.Image` stays what it is on disk, `{"bytes": …, "path": …}`, and is opened by
`data.media` like every other picture. `datasets`' folders are mapped into memory, so that any row is found at once.
Parquet is compressed by groups of rows; for rows in any order a file is written out once as Arrow, in the cache folder.
`datasets` and Arrow's scanner read ahead in threads, and tell of a damaged group earlier or later as it happens. Where
the damage comes decides which row every later place of a stream holds, so groups are read one after the other here.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opticnerve.common.cache import cache_dir, new_folder
from opticnerve.data.sources.base import Location, Record
from opticnerve.types import DataError

BATCH = 64
"""Rows that are turned to Python at a time: pictures are large."""
_SMALL = 8 << 20  # bytes of Parquet that are held in memory instead of written out


class SavedTable:
    """A folder saved by `datasets`."""

    def __init__(self, path: Path, split: str | None = None) -> None:
        self.path, self.split = path, split
        self.files = sorted(f for f in path.rglob("*") if f.is_file())
        self._rows: Any = None
        self._features: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def __iter__(self) -> Iterator[Record]:
        """The rows in their order.

        Raises:
            DataError: the folder holds several splits (each is named), or a damaged table.
        """
        with _reading(self.path):
            tables = self._table().iter(batch_size=BATCH)
            for index, fields in enumerate(row for table in tables for row in self._rows_of(table)):
                yield Record(fields, f"{self.path}[{index}]", index, Location(0, index, 1))

    def at(self, place: Location, index: int) -> Record:
        with _reading(self.path):
            (fields,) = self._rows_of(self._table()[place.start : place.start + 1])
        return Record(fields, f"{self.path}[{index}]", index, place)

    def _rows_of(self, table: Any) -> Iterator[dict[str, Any]]:
        table.validate(full=True)  # Arrow maps the file as it is, and would read where a damaged offset leads
        return rows_of(table, self._features)

    def _table(self) -> Any:
        if self._rows is None:
            import datasets  # type: ignore[import-untyped]

            try:
                loaded = datasets.load_from_disk(str(self.path))
            except Exception as e:  # what its files say is not checked there
                raise _unreadable(self.path, e) from e
            if isinstance(loaded, datasets.DatasetDict):
                if (len(loaded) != 1 and self.split is None) or self.split not in (None, *loaded):
                    raise DataError(
                        f"the folder holds the splits {', '.join(loaded)}", where=str(self.path), kind="format",
                        remedy=f"name one with hub_split, or its folder: {self.path / next(iter(loaded), 'train')}",
                    )  # fmt: skip
                loaded = loaded[self.split or next(iter(loaded))]
            elif self.split not in (None, "train"):
                problem = "the folder holds one split"
                raise DataError(problem, where=str(self.path), remedy="leave hub_split out", kind="format")
            self._features = loaded.features
            self._rows = loaded.with_format("arrow")
        return self._rows


def saved_by_datasets(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_info.json", "state.json", "dataset_dict.json"))


class ParquetTables:
    """One Parquet file, or several of a folder; each row is called by its own file."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.path, self.files = path, list(files)
        self._tables: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def __iter__(self) -> Iterator[Record]:
        """The rows in their order; a file that is damaged raises when its turn comes."""
        for number, file in enumerate(self.files):
            with _reading(file):
                rows = (row for _, table in batches(str(file)) for row in rows_of(table, None))
                for row, fields in enumerate(rows):
                    yield self._record(fields, row, Location(number, row, 1))

    def at(self, place: Location, index: int) -> Record:
        with _reading(self.files[place.file]):
            (fields,) = rows_of(self._table(place.file).slice(place.start, 1), None)
        return self._record(fields, index, place)

    def _record(self, fields: dict[str, Any], row: int, place: Location) -> Record:
        file = self.files[place.file]
        if len(self.files) > 1 and fields.get("id") in (None, ""):
            fields["id"] = f"{file.stem}-{row}"
        return Record(fields, f"{file}[{row}]", row, place)

    def _table(self, number: int) -> Any:
        import pyarrow as pa  # type: ignore[import-untyped]

        if number not in self._tables:
            file = self.files[number]
            if file.stat().st_size <= _SMALL:
                self._tables[number] = pa.concat_tables(table for _, table in batches(str(file)))
            else:
                self._tables[number] = pa.ipc.open_file(pa.memory_map(str(_as_arrow(file)))).read_all()
        return self._tables[number]


def _as_arrow(file: Path) -> Path:
    """The file's rows in a form that can be mapped; written once."""
    import pyarrow as pa
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    stat = file.stat()
    key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    target = cache_dir() / "tables" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not target.is_dir():
        with new_folder(target) as made, pa.ipc.new_file(str(made / "rows.arrow"), pq.read_schema(file)) as writer:
            for _, table in batches(str(file)):
                writer.write_table(table)
    return target / "rows.arrow"


def batches(name: str, start: int = 0) -> Iterator[tuple[int, Any]]:
    """(number of its first row, table) of a Parquet file from row `start` on: no more is read than the row group that
    it lies in. `name`: a path, or `hf://datasets/owner/name@revision/file`.

    Raises:
        pyarrow.ArrowException, OSError: what comes next is damaged, or could not be fetched.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open(name) as file, pq.ParquetFile(file) as parquet:
        if twice := [column for column, count in Counter(parquet.schema_arrow.names).items() if count > 1]:
            problem = f"two columns are called {twice[0]}"  # only one of them could be read
            raise DataError(problem, where=name, remedy="give each a name of its own", kind="table")
        first = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if first + rows > start:
                at = first
                for batch in parquet.iter_batches(BATCH, row_groups=[group], use_threads=False):
                    if at + len(batch) > start:
                        skipped = max(0, start - at)
                        yield at + skipped, pa.Table.from_batches([batch]).slice(skipped)
                    at += len(batch)
            first += rows


def _open(name: str) -> Any:
    if "://" not in name:
        return open(name, "rb")
    import fsspec  # type: ignore[import-untyped]

    return fsspec.open(name, "rb").open()


def rows_of(table: Any, features: Mapping[str, object] | None) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow table; `features`: as `datasets` knows them, or None where the table's own notes tell."""
    kinds = features or {}
    if features is None and b"huggingface" in (table.schema.metadata or {}):  # written by datasets
        import datasets

        kinds = datasets.Features.from_arrow_schema(table.schema)
    mixed = {name for name, kind in kinds.items() if "Json(" in repr(kind)}
    for row in table.to_pylist():
        for name in mixed & row.keys():
            row[name] = _read_json(row[name], kinds[name])
        yield row


def _read_json(value: Any, kind: object) -> Any:
    """Values of mixed types, such as chat's `content`, are JSON texts in Arrow."""
    import datasets

    if value is None:
        return None
    if isinstance(kind, datasets.Json):
        return json.loads(value) if isinstance(value, str | bytes) else value
    if isinstance(kind, dict):
        return {name: _read_json(value.get(name), inner) for name, inner in kind.items()}
    if isinstance(kind, list):
        return [_read_json(item, kind[0]) for item in value]
    inner = getattr(kind, "feature", None)
    return [_read_json(item, inner) for item in value] if inner is not None and isinstance(value, list) else value


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Arrow's errors as ours."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise _unreadable(path, e) from e


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return DataError(f"the table cannot be read: {reason}", where=str(path), kind="table")
