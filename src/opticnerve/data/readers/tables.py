"""Tables as records: a folder written by `datasets.Dataset.save_to_disk`, a Parquet file, or a folder of them.

Cells come raw from Arrow: a `datasets.Image` stays what it is on disk, `{"bytes": …, "path": …}`, and is opened by
`data.images` like every other picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from opticnerve.data.readers.records import Record
from opticnerve.types import DataError

_ROWS = 64  # rows turned to Python at a time: pictures are large


def table_records(path: Path) -> Iterator[Record]:
    """The rows in their order; `where` is `folder[12]`.

    Raises:
        DataError: the folder holds several splits (each is named), no table, or a damaged one.
    """
    for index, fields in enumerate(_rows(path)):
        yield Record(fields, f"{path}[{index}]", index)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa  # type: ignore[import-untyped]

    try:
        if path.is_dir() and _saved_by_datasets(path):
            yield from _from_datasets(path)
        else:
            yield from _from_parquet(_parquet_files(path))
    except (pa.ArrowException, OSError) as e:
        reason = str(e).strip().split("\n")[0]
        raise DataError(f"the table cannot be read: {reason}", where=str(path), kind="table") from e


def _saved_by_datasets(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_info.json", "state.json", "dataset_dict.json"))


def _from_datasets(folder: Path) -> Iterator[dict[str, Any]]:
    import datasets  # type: ignore[import-untyped]

    loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) != 1:
            raise DataError(
                f"the folder holds the splits {', '.join(loaded)}",
                where=str(folder),
                remedy=f"name one: {folder / next(iter(loaded), 'train')}",
                kind="format",
            )
        loaded = next(iter(loaded.values()))
    tables: Iterable[Any] = loaded.with_format("arrow").iter(batch_size=_ROWS)
    for table in tables:
        yield from table.to_pylist()


def _from_parquet(files: list[Path]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    for file in files:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_ROWS):
                yield from batch.to_pylist()


def _parquet_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(path.rglob("*.parquet"))
    if not files:
        raise DataError(
            "the folder holds neither a saved dataset nor .parquet files",
            where=str(path),
            remedy="name the .json, .jsonl or .csv file itself, or save with datasets' save_to_disk",
            kind="format",
        )
    return files
