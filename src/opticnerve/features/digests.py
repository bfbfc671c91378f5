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
        if isinstance(source, _File) and source in self._known:
            return self._known[source]
        made = image_digest(source, where=where)
        if isinstance(source, _File):
            self._known[source] = made
        return made

    def of(self, pictures: Sequence[tuple[Source, str]]) -> list[str | DataError]:
        """Many pictures', in their order; in the place of one that cannot be read, why."""
        files = {s: where for s, where in pictures if isinstance(s, _File) and s not in self._known}
        keys = {s: key for s in files if (key := _key(s)) is not None}
        self._known |= self._recall(keys)
        new = [(s, files[s]) for s in keys if s not in self._known]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            failed = {s: e for (s, _), e in zip(new, pool.map(self._one, new), strict=True) if isinstance(e, DataError)}
        self._remember([(*keys[s], self._known[s]) for s, _ in new if s not in failed])
        return [failed[p[0]] if isinstance(p[0], _File) and p[0] in failed else self._one(p) for p in pictures]

    def _one(self, picture: tuple[Source, str]) -> str | DataError:
        try:
            return self(*picture)
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
            base.executemany("insert or replace into digests values (?, ?, ?, ?)", rows)

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(sqlite3.connect(str(self.file), timeout=60)) as base:
                base.execute(_TABLE)
                yield base
        except sqlite3.Error as e:
            raise OpticNerveError(
                f"{self.file} cannot be used: {e}; delete it, it only saves time", kind="damaged"
            ) from e


def _key(source: _File) -> tuple[str, int, int] | None:
    """What a file is known by; None for what is no file (a folder of frames may change within)."""
    path = source.source if isinstance(source, Frame) else source
    if not isinstance(path, Path) or not path.is_file():
        return None
    stat = path.stat()
    frame = f"#{source.key}" if isinstance(source, Frame) else ""
    return os.path.abspath(path) + frame, stat.st_size, stat.st_mtime_ns
