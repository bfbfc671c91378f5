"""Where every good sample of a source lies, found in one pass, so that samples are read when they are asked for.

A sample takes 36 bytes: its place, and what sorting needs of its pictures. Of a source of some size the index is kept
in the cache folder, with every bad sample's error, and mapped from there; it is taken again while nothing that it
depends on has changed: the contents of the data (hashed; beyond 4 GiB their sizes, times and samples of them), the
folders in which media were looked for (their times of change), the options, and the readers themselves.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from opticnerve.common import atomic
from opticnerve.common.cache import alone, cache_dir, new_folder
from opticnerve.data.dataset.opened import OnError, OpenSource
from opticnerve.data.dataset.read import DataSource, open_source, raise_error
from opticnerve.data.formats.media import MOST_FOLDERS, folder_age
from opticnerve.data.sources.base import Location, Records
from opticnerve.types import Conversation, DataError, Frame

KEPT = 16 << 20
"""Bytes of data from which on an index is kept on disk: reading less takes no time."""
_HASHED = 4 << 30
_SAMPLED, _SAMPLE = 64, 1 << 16
_UNSURE = 2_000_000_000
"""Nanoseconds: what changed so shortly before it was looked at may have changed after it, within one tick."""

ROW = np.dtype(
    [("start", "<u8"), ("picture", "<u8"), ("size", "<u4"), ("file", "<u4"), ("index", "<u4"), ("part", "<u4"),
     ("side", "<u2"), ("images", "u1"), ("pieces", "u1")]
)  # fmt: skip
"""`part`: which of its record's conversations. `picture`: a hash of which pictures and sounds it shows. `side`: the
first of `sides_of`. `images`: how many pictures, `pieces`: sounds, too; 255 for more."""
_PACKED = struct.Struct("<2Q4IH2B")  # a row
SIDES = 1 << 16
_NO_KEY = SIDES - 1  # neither in the held-out twentieth nor in any split


@dataclass
class Index:
    """The rows of a source's good samples, in their order, and how to read them. `left_out`: records that the data
    entry's `where` left out."""

    rows: NDArray[Any]
    source: OpenSource
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, number: int) -> Conversation:
        """Read one sample.

        Raises:
            DataError: it is no longer what it was, or a file that it names is gone.
        """
        row = self.rows[number]
        place = Location(int(row["file"]), int(row["start"]), int(row["size"]))
        return self.source.one(self.source.records.at(place, int(row["index"])), int(row["part"]))


def index_of(source: DataSource, on_error: OnError | None = None) -> Index:
    """The index of a source, made or found; `limit` and `group_by_image` are the caller's business, save that with
    `limit` alone no more is read than it takes.

    Raises:
        DataError: as `read`: a bad sample without `on_error`, or a source that cannot be read at all.
    """
    source.check()
    tell = raise_error if on_error is None else on_error  # a counter that has counted nothing is false
    records = source.records()
    files = records.files
    if sum(size for size, _ in _stats(files)) < KEPT:
        file = io.BytesIO()
        opened = open_source(source, tell, records=records)
        left_out = _collect(opened, file, _limit(source), tell)
        return Index(np.frombuffer(file.getvalue(), ROW), opened.read(), left_out)
    options = [str(source.path), str(Path(source.path).absolute()), source.format, str(source.media), source.prompt,
               source.allow_outside_media, str(source.frames), _limit(source), list(source.ignore), source.split,
               list(source.repair), dict(source.columns), dict(source.roles), str(source.annotations),
               str(source.media_cache), source.where, source.allow_private_hosts, str(source.boxes),
               _readers()]  # fmt: skip
    folder = cache_dir() / "indexes" / hashlib.sha256(json.dumps(options).encode()).hexdigest()[:24]
    problem, remedy = (
        f"the index of data in {folder} cannot be written",
        "let OPTICNERVE_CACHE name a folder that can be",
    )
    with alone(folder, problem, remedy):  # several processes start at once: one makes it, the others find it
        started = time.time_ns()
        before = _stats(files)
        found = folder / _contents(files, started)
        if about := _still_true(found):
            with (found / "errors.jsonl").open() as errors:
                for line in errors:
                    problem, where, remedy, kind = json.loads(line)
                    tell(DataError(problem, where=where, remedy=remedy, kind=kind))
            opened = open_source(source, _pass_over, records=records)
            left_out = about["left_out"]
        else:
            shutil.rmtree(found, ignore_errors=True)
            opened, left_out = _make(source, records, found, started, tell)
            if _stats(files) != before:
                shutil.rmtree(found, ignore_errors=True)
                raise DataError("it changed while it was read", where=str(source.path), kind="changed-file")
            for old in folder.iterdir():
                if old.is_dir() and old != found:
                    shutil.rmtree(old, ignore_errors=True)
        kept = found / "rows"
        rows: NDArray[Any] = np.memmap(kept, ROW, "r") if kept.stat().st_size else np.zeros(0, ROW)
    return Index(rows, opened.read(), left_out)


def picture_key(sources: Sequence[Any]) -> int:
    """A hash (63 bits, odd) of which pictures and sounds these are, by their paths or bytes; 0 if there are none."""
    if not sources:
        return 0
    named = "\n".join(map(_named, sources)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little") | 1


def held_out(conversation: Conversation) -> bool:
    """Whether a sample belongs to the held-out twentieth.

    The hash of its first picture's (or sound's) file name (or bytes) decides, so that all that is said of one picture
    stays on one side, in every data file and on every machine.
    """
    return bool(conversation.pieces) and in_twentieth(sides_of(conversation)[0])


def in_twentieth(side: Any) -> Any:
    """Whether the `side` of a picture, or of many, is held out by `split: held_out`."""
    return (side & 255) % 20 == 0


def sides_of(conversation: Conversation) -> list[int]:
    """By what splits go: 16 bits of a hash for each picture and sound, of its file's name (or its bytes), so that a
    file falls on the same side wherever it lies; of text alone, of its words."""
    if not conversation.pieces:
        return [_side("\n".join(m.text for m in conversation.messages).encode("utf-8", "surrogatepass"))]
    sides = []
    for part in conversation.pieces:
        source = part.source.source if isinstance(part.source, Frame) else part.source
        if isinstance(source, Path | bytes):
            sides.append(_side(source.name.encode("utf-8", "surrogateescape") if isinstance(source, Path) else source))
    return sides or [_NO_KEY]


def _side(key: bytes) -> int:
    return int.from_bytes(hashlib.sha256(key).digest()[:2], "little")


def _named(source: object) -> str:
    if isinstance(source, Frame):
        return f"{_named(source.source)} {source.key}"
    return f"{type(source).__name__} {hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else source}"


def _make(source: DataSource, records: Records, target: Path, started: int, tell: OnError) -> tuple[OpenSource, int]:
    """On disk, whole or not at all; what was opened for it, and how many records were left out."""
    folders: dict[str, int] = {}
    with new_folder(target) as made:
        with (made / "rows").open("wb") as file, (made / "errors.jsonl").open("w") as errors:

            def note(error: DataError) -> None:
                errors.write(json.dumps([error.problem, error.where, error.remedy, error.kind]) + "\n")
                tell(error)

            opened = open_source(source, note, folders=folders, records=records)
            left_out = _collect(opened, file, _limit(source), note)
        # What changed while it was read, or too shortly before to be sure, is not relied on.
        sure = len(folders) <= MOST_FOLDERS and all(age < started - _UNSURE for age in folders.values())
        about = {"folders": folders if sure else None, "left_out": left_out}
        atomic.write(made / "about.json", json.dumps(about))
    return opened, left_out


def _collect(opened: OpenSource, file: BinaryIO, limit: int | None, tell: OnError) -> int:
    """Write a row for each good sample, as they come; say how many records `where` left out."""
    left_out = Counter[str]()
    for record, part, conversation in islice(opened.converted(tell, left_out), limit):
        place, pieces = record.place, conversation.pieces
        if place.size >= 1 << 32:
            raise DataError(f"a record of {place.size:,} bytes", where=record.where, kind="too-long")
        picture = picture_key([p.source for p in pieces])
        images, shown = (min(255, len(listed)) for listed in (conversation.images, pieces))
        file.write(
            _PACKED.pack(place.start, picture, place.size, place.file, record.index, part,
                         sides_of(conversation)[0], images, shown)
        )  # fmt: skip
    return left_out.total()


def _limit(source: DataSource) -> int | None:
    """Groups are complete when all is read."""
    return None if source.group_by_image else source.limit


def _still_true(found: Path) -> dict[str, Any] | None:
    """What is known of an index, as long as the folders of its media are as they were."""
    try:
        about: dict[str, Any] = json.loads((found / "about.json").read_text())
        folders = about["folders"]
    except (OSError, ValueError, KeyError):
        return None
    return about if folders is not None and all(folder_age(f) == age for f, age in folders.items()) else None


def _contents(files: Sequence[Path], now: int) -> str:
    """A hash of what the files hold. Of more than 4 GiB, of their sizes, times and 64 pieces each; and of what changed
    just now, of the present moment: it is not taken for known."""
    stats = _stats(files)
    whole = sum(size for size, _ in stats) <= _HASHED
    total = hashlib.blake2b(digest_size=16)
    for file, (size, age) in zip(files, stats, strict=True):
        total.update(f"{file}|{size}\n".encode("utf-8", "surrogateescape"))
        if age < 0:
            continue
        with file.open("rb", buffering=0) as opened:
            if whole:
                while block := opened.read(1 << 20):
                    total.update(block)
                continue
            total.update(f"{age} {now if age > now - _UNSURE else 0}".encode())
            for number in range(_SAMPLED):
                opened.seek(size * number // _SAMPLED)
                total.update(opened.read(_SAMPLE))
    return total.hexdigest()


def _stats(files: Sequence[Path]) -> list[tuple[int, int]]:
    """(bytes, time of change) of each; (0, -1) of one that is missing."""
    found = (f.stat() if f.exists() else None for f in files)
    return [(s.st_size, s.st_mtime_ns) if s is not None else (0, -1) for s in found]


def _readers() -> str:
    """A hash of the code that reads: with other rules, other samples are good."""
    folders = (files("opticnerve.data") / part for part in ("formats", "sources", "dataset", "media"))
    code = sorted(f for folder in folders for f in folder.iterdir() if f.name.endswith(".py"))  # type: ignore[type-var]
    return hashlib.sha256(b"".join(f.read_bytes() for f in code)).hexdigest()


def _pass_over(error: DataError) -> None:
    """It has been told already."""
