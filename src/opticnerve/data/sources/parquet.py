"""The rows of one Parquet file from any row on, here or on the hub: no more is read than the row group they lie in.

`datasets` and Arrow's scanner read ahead in threads, and tell of a damaged group earlier or later as it happens. Where
the damage comes decides which row every later place holds, so groups are read one after the other here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from opticnerve.types import DataError

BATCH = 64
"""Rows that are turned to Python at a time: pictures are large."""


def open_parquet(name: str) -> Any:
    """A file to read: of this machine, or `hf://datasets/owner/name@revision/file`."""
    if "://" not in name:
        return open(name, "rb")
    import fsspec  # type: ignore[import-untyped]

    return fsspec.open(name, "rb").open()


def batches(name: str, start: int) -> Iterator[tuple[int, Any]]:
    """(number of its first row, table) from row `start` on.

    Raises:
        pyarrow.ArrowException, OSError: what comes next is damaged, or could not be fetched.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    with open_parquet(name) as file, pq.ParquetFile(file) as parquet:
        no_column_twice(parquet.schema_arrow, name)
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


def rows_of(table: Any, features: Any) -> Iterator[dict[str, Any]]:
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


def _read_json(value: Any, kind: Any) -> Any:
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


def no_column_twice(schema: Any, where: str) -> None:
    """Refuse a table of which two columns have one name: only one of them could be read."""
    if twice := [name for name, count in Counter(schema.names).items() if count > 1]:
        raise DataError(
            f"two columns are called {twice[0]}", where=where, remedy="give each a name of its own", kind="table"
        )
