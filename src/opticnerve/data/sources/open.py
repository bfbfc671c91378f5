"""The records of a path, whatever kind of file or folder it is.

A folder was saved by `datasets`, or holds files of Parquet, JSON lines, CSV or JSON, tar shards, or an imagefolder:
pictures with `metadata.csv`, `.jsonl` or `.parquet` (huggingface.co/docs/datasets/image_dataset), each with a text file
of its own name, or in folders that are called as what they show. One split of it is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opticnerve.data.sources.base import CSV_SUFFIXES, JSONL_SUFFIXES, JsonLines, Location, Record, Records, refused
from opticnerve.data.sources.csv_rows import Csv
from opticnerve.data.sources.json_list import open_json
from opticnerve.data.sources.json_text import lines_of
from opticnerve.data.sources.paths import matching, one_split
from opticnerve.data.sources.pictures import PictureFolders
from opticnerve.data.sources.tables import ParquetTables, SavedTable, saved_by_datasets
from opticnerve.data.sources.webdataset import PICTURES, Shards, is_shards
from opticnerve.types import DataError

_KINDS = ((".parquet",), JSONL_SUFFIXES, CSV_SUFFIXES, (".json",))
_TEXT_TABLES = (".txt", ".token")  # Flickr8k's
_NO_DATA = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}


def open_records(path: Path, format: str = "auto", split: str | None = None, *, close_quotes: bool = False) -> Records:
    """The records of a path, which may be a pattern of shards or of files.

    Args:
        split: which of a folder's splits. close_quotes: of a table, take the quotes of a line that cannot be read
            with them as they stand.

    Raises:
        DataError: the file is missing, or of an unknown suffix; a folder of several splits, of which none is named.
    """
    if format == "webdataset" or is_shards(path):
        return Shards(path, split)
    files = [] if path.exists() or not any(sign in str(path) for sign in "*?[{") else matching(str(path), split)
    if files and files != [path]:  # a name with a brace may stand for itself alone
        return _of_files(Path(os.path.commonpath([f.parent for f in files])), files, close_quotes)
    if not path.exists():
        remedy = "check the path"
        if format == "hf" and not path.is_absolute():
            remedy += "; a data set on the hub is read with streaming: true, or downloaded first and its folder named"
        raise refused(path, "no such data file or folder", remedy, "missing-file")
    if not os.access(path, os.R_OK):
        raise refused(path, "no permission to read it", "chmod u+r", "missing-file")
    suffix = path.suffix.lower()
    if path.is_dir():
        return _open_folder(path, split, close_quotes)
    if split not in (None, "train"):  # one file is what is trained on
        problem = f"hub_split names the split {split!r}, and this is one file"
        raise refused(path, problem, "leave hub_split out")
    if suffix == ".parquet":
        return ParquetTables(path, [path])
    if suffix in JSONL_SUFFIXES:
        return open_json(path) if _is_list(path) else JsonLines(path)
    if suffix in (*CSV_SUFFIXES, *_TEXT_TABLES):
        return Csv(path, close_quotes=close_quotes)
    if suffix == ".json":
        return open_json(path)
    problem = f"cannot tell what kind of data file {suffix or 'a file without a suffix'!r} is"
    raise refused(path, problem, "use .json, .jsonl, .csv, .tsv, .parquet, .tar, or a folder saved by datasets")


def _is_list(path: Path) -> bool:
    """Whether a file that is called .jsonl holds one JSON list: its first line is a bracket, or no line of its own."""
    with path.open("rb") as file:
        first = next(lines_of(file, 1 << 20), b"")
    return first[:1] == b"[" and first[1:].strip()[:1] in (b"", b"{")


def _open_folder(folder: Path, split: str | None, close_quotes: bool) -> Records:
    """The records of one split of a folder, file by file.

    Raises:
        DataError: it holds no data files, or several splits of which none is named.
    """
    if saved_by_datasets(folder):
        return SavedTable(folder, split)
    saved = sorted(f.parent for name in ("dataset_info.json", "state.json") for f in folder.glob(f"*/{name}"))
    if saved:
        return SavedTable(one_split(folder, list(dict.fromkeys(saved)), split)[0], None)
    found = _data_files(folder)
    if is_shards(found[0]):
        return Shards(folder, split)
    if found[0].suffix.lower().lstrip(".") in PICTURES:
        return PictureFolders(folder, one_split(folder, found, split))
    return _of_files(folder, one_split(folder, found, split), close_quotes)


def _of_files(folder: Path, files: Sequence[Path], close_quotes: bool) -> Records:
    """The records of several files below a folder, one file after the other."""
    if all(f.suffix.lower() == ".parquet" and f.stem != "metadata" for f in files):
        return ParquetTables(folder, files)
    return Files(folder, files, [open_records(f, close_quotes=close_quotes) for f in files])


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
    pictures = [f for f in found if f.suffix.lower().lstrip(".") in PICTURES]
    texts = {f for f in found if f.suffix == ".txt"}
    if any(f.with_suffix(".txt") in texts for f in pictures) or {f.parent for f in pictures} - {folder}:
        return pictures
    remedy = (
        "name the data file itself; pictures alone want a metadata.csv with file_name and caption, a text file "
        "each, or folders called as what they show"
    )
    raise refused(folder, "the folder holds neither a saved dataset nor files of data", remedy)


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


def _below(folder: Path, value: object) -> Any:
    """imagefolder's names start from where its metadata lie."""
    if isinstance(value, list):
        return [_below(folder, v) for v in value]
    return (folder / value).as_posix() if isinstance(value, str) and value else value
