"""A folder as records: saved by `datasets`, or files of Parquet, JSON lines, CSV or JSON, tar shards, or an imagefolder
(pictures with `metadata.csv`, `.jsonl` or `.parquet`: huggingface.co/docs/datasets/image_dataset). One split of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opticnerve.data.sources.arrow import ParquetTables, SavedTable, saved_by_datasets
from opticnerve.data.sources.base import CSV_SUFFIXES, JSONL_SUFFIXES, Location, Record, Records
from opticnerve.data.sources.splits import one_split
from opticnerve.data.sources.webdataset import Shards, is_shards
from opticnerve.types import DataError

_KINDS = ((".parquet",), JSONL_SUFFIXES, CSV_SUFFIXES, (".json",))
_NO_DATA = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}


def open_folder(folder: Path, split: str | None, open_file: Callable[[Path], Records]) -> Records:
    """The records of one split of a folder, each file of which `open_file` opens.

    Raises:
        DataError: it holds no data files, or several splits of which none is named.
    """
    if saved_by_datasets(folder):
        return SavedTable(folder, split)
    saved = sorted(f.parent for name in ("dataset_info.json", "state.json") for f in folder.glob(f"*/{name}"))
    if saved:
        return SavedTable(one_split(folder, list(dict.fromkeys(saved)), split)[0], None)
    if (folder / "dataset_dict.json").is_file():
        return SavedTable(folder, split)
    found = _data_files(folder)
    if is_shards(found[0]):
        return Shards(folder, split)
    files = one_split(folder, found, split)
    if all(f.suffix.lower() == ".parquet" and f.stem != "metadata" for f in files):
        return ParquetTables(folder, files)
    return Files(folder, files, list(map(open_file, files)))


def _data_files(folder: Path) -> list[Path]:
    found = sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in _NO_DATA and _visible(f, folder))
    listed = [f for f in found if f.stem == "metadata" and f.suffix.lower() in (".csv", ".jsonl", ".parquet")]
    if listed:
        return listed
    for suffixes in _KINDS:
        if files := [f for f in found if f.suffix.lower() in suffixes]:
            return files
    if shards := [f for f in found if is_shards(f)]:
        return shards
    raise DataError(
        "the folder holds neither a saved dataset nor files of data",
        where=str(folder),
        remedy="name the data file itself; pictures alone want a metadata.csv with file_name and caption",
        kind="format",
    )


def _visible(file: Path, folder: Path) -> bool:
    return not any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


class Files:
    """The records of several files, one after the other; each is called by its own file and line."""

    def __init__(self, folder: Path, files: Sequence[Path], parts: Sequence[Records]) -> None:
        self.folder, self.files, self.parts = folder, list(files), parts

    def __iter__(self) -> Iterator[Record | DataError]:
        for number, part in enumerate(self.parts):
            for item in part:
                yield self._of_file(item, number) if isinstance(item, Record) else item

    def at(self, place: Location, index: int) -> Record:
        found = self.parts[place.file].at(Location(0, place.start, place.size), index)
        return self._of_file(found, place.file)

    def _of_file(self, record: Record, number: int) -> Record:
        file = self.files[number]
        inner = file.relative_to(self.folder).parent
        fields = dict(record.fields)
        if file.stem == "metadata" and inner.parts:
            fields = {
                k: _below(inner, v) if k.lower().endswith(("file_name", "file_names")) else v for k, v in fields.items()
            }
        if len(self.files) > 1 and fields.get("id") in (None, ""):
            fields["id"] = f"{file.relative_to(self.folder).with_suffix('').as_posix()}-{record.index}"
        return replace(record, fields=fields, place=Location(number, record.place.start, record.place.size))


def _below(folder: Path, value: Any) -> Any:
    """imagefolder's names start from where its metadata lie."""
    if isinstance(value, list):
        return [_below(folder, v) for v in value]
    return (folder / value).as_posix() if isinstance(value, str) and value else value
