"""The rows of one Parquet file from any row on, here or on the hub: no more is read than the row group they lie in.

`datasets` and Arrow's scanner read ahead in threads, and tell of a damaged group earlier or later as it happens. Where
the damage comes decides which row every later place holds, so groups are read one after the other here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
