"""Hashes of pictures, each file read once: remembered by path, size and time of change, in memory and on disk."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from opticnerve.data.media.images import Source
from opticnerve.data.media.open import image_digest
from opticnerve.types import DataError, Frame, OpticNerveError

_File = Path | Frame  # what is remembered: bytes and opened pictures are hashed where they lie

_TABLE = "create table if not exists digests (key text primary key, size int, changed int, digest text) without rowid"


class Digests:
    """Content hashes of pictures.

    Args:
        file: an SQLite database that several processes may share. A file on disk is hashed again when its path, its
            size or its time of change (in nanoseconds) is another. Without it, hashes are remembered in memory alone.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self._known: dict[_File, str] = {}

    def __call__(self, source: Source, where: str) -> str:
        """One picture's; what `of` has seen is known."""
        if (found := self._known.get(source) if isinstance(source, _File) else None) is not None:
            return found
        made = image_digest(source, where=where)
        if isinstance(source, _File):
            self._known[source] = made
        return made

    def of(self, pictures: Sequence[tuple[Source, str]]) -> list[str | DataError]:
        """Many pictures', in their order; in the place of one that cannot be read, why."""
        files = {s: where for s, where in pictures if isinstance(s, _File) and s not in self._known}
        keys = {s: key for s in files if (key := _key(s)) is not None}
        self._known |= self._recall(keys)
        new = {s: where for s, where in files.items() if s in keys and s not in self._known}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            made: dict[Source, str | DataError] = dict(zip(new, pool.map(_try, new.items()), strict=True))
        good = {s: d for s in new if isinstance(d := made[s], str)}
        self._known |= good
        self._remember([(*keys[s], d) for s, d in good.items()])
        # Opened pictures cannot be keys of a dictionary; they are never in `new`.
        return [made[s] if isinstance(s, _File) and s in made else self._one(s, where) for s, where in pictures]

    def _one(self, source: Source, where: str) -> str | DataError:
        try:
            return self(source, where)
        except DataError as e:
            return e

    def _recall(self, keys: dict[_File, tuple[str, int, int]]) -> dict[_File, str]:
        if self.file is None or not self.file.exists():
            return {}
        with self._open() as base:
            wanted = "select digest from digests where key = ? and size = ? and changed = ?"
            found = {s: base.execute(wanted, key).fetchone() for s, key in keys.items()}
        return {s: row[0] for s, row in found.items() if row is not None}

    def _remember(self, rows: list[tuple[str, int, int, str]]) -> None:
        if self.file is None or not rows:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as base, base:
            base.execute(_TABLE)
            base.executemany("insert or replace into digests values (?, ?, ?, ?)", rows)

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(sqlite3.connect(str(self.file), timeout=60)) as base:
                base.execute(_TABLE)
                yield base
        except sqlite3.Error as e:
            raise OpticNerveError(f"{self.file} cannot be used: {e}; delete it, it only saves time") from e


def _try(picture: tuple[_File, str]) -> str | DataError:
    try:
        return image_digest(picture[0], where=picture[1])
    except DataError as e:
        return e


def _key(source: _File) -> tuple[str, int, int] | None:
    """What a file is known by; None for what is no file (a folder of frames may change within)."""
    path = source.source if isinstance(source, Frame) else source
    if not isinstance(path, Path) or not path.is_file():
        return None
    stat = path.stat()
    frame = f"#{source.index}/{source.of}" if isinstance(source, Frame) else ""
    return os.path.abspath(path) + frame, stat.st_size, stat.st_mtime_ns
