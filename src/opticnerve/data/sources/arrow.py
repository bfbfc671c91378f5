"""Tables as records: a folder written by `datasets.Dataset.save_to_disk`, a Parquet file, or a folder of them.

Cells come raw from Arrow: a `datasets.Image` stays what it is on disk, `{"bytes": …, "path": …}`, and is opened by
`data.images` like every other picture. `datasets`' folders are mapped into memory, so that any row is found at once.
Parquet is compressed by groups of rows; for rows in any order a file is written out once as Arrow, in the cache folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opticnerve.common.cache import cache_dir, new_folder
from opticnerve.data.sources.base import Location, Record
from opticnerve.data.sources.parquet import no_column_twice, rows_of
from opticnerve.types import DataError

_ROWS = 64  # rows turned to Python at a time: pictures are large
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
            tables = self._table().iter(batch_size=_ROWS)
            for index, fields in enumerate(row for table in tables for row in rows_of(table, self._features)):
                yield Record(fields, f"{self.path}[{index}]", index, Location(0, index, 1))

    def at(self, place: Location, index: int) -> Record:
        with _reading(self.path):
            (fields,) = rows_of(self._table()[place.start : place.start + 1], self._features)
        return Record(fields, f"{self.path}[{index}]", index, place)

    def _table(self) -> Any:
        if self._rows is None:
            import datasets  # type: ignore[import-untyped]

            loaded = datasets.load_from_disk(str(self.path))
            if isinstance(loaded, datasets.DatasetDict):
                if (len(loaded) != 1 and self.split is None) or self.split not in (None, *loaded):
                    raise DataError(
                        f"the folder holds the splits {', '.join(loaded)}",
                        where=str(self.path),
                        remedy=f"name one with hub_split, or its folder: {self.path / next(iter(loaded), 'train')}",
                        kind="format",
                    )
                loaded = loaded[self.split or next(iter(loaded))]
            elif self.split not in (None, "train"):
                raise DataError("the folder holds one split", where=str(self.path), remedy="leave hub_split out",
                                kind="format")  # fmt: skip
            self._features = loaded.features
            self._rows = loaded.with_format("arrow")
        return self._rows


class ParquetTables:
    """One Parquet file, or several of a folder; each row is called by its own file."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.path = path
        self.files = list(files)
        self._tables: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def __iter__(self) -> Iterator[Record]:
        """The rows in their order; a file that is damaged raises when its turn comes."""
        for number, file in enumerate(self.files):
            with _reading(file):
                rows = (row for batch in _batches(file) for row in rows_of(batch, None))
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
                self._tables[number] = pa.Table.from_batches(_batches(file), schema=_schema(file))
            else:
                self._tables[number] = pa.ipc.open_file(pa.memory_map(str(_as_arrow(file)))).read_all()
        return self._tables[number]


def _as_arrow(file: Path) -> Path:
    """The file's rows in a form that can be mapped; written once."""
    import pyarrow as pa

    stat = file.stat()
    key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    target = cache_dir() / "tables" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not target.is_dir():
        with new_folder(target) as made, pa.ipc.new_file(str(made / "rows.arrow"), _schema(file)) as writer:
            for batch in _batches(file):
                writer.write_batch(batch)
    return target / "rows.arrow"


def _batches(file: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with pq.ParquetFile(file) as table:
        no_column_twice(table.schema_arrow, str(file))
        yield from table.iter_batches(batch_size=_ROWS)


def _schema(file: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_schema(file)


def saved_by_datasets(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_info.json", "state.json", "dataset_dict.json"))


class _reading:
    """Arrow's errors as ours."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import pyarrow as pa

        if isinstance(error, pa.ArrowException | OSError | UnicodeDecodeError):
            reason = str(error).strip().split("\n")[0]
            raise DataError(f"the table cannot be read: {reason}", where=str(self.path), kind="table") from error
