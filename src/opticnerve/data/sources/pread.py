"""Bytes out of files that stay open, by number and place, from several processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opticnerve.types import DataError

_MOST_OPEN = 32


class Handles:
    """Some files, each opened when it is first read; a few dozen stay open.

    `pread` moves no cursor, so that processes which share a handle by fork do not disturb each other; a copy that is
    pickled opens its own.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self._open: dict[int, int] = {}
        self._sizes: dict[int, tuple[int, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        for handle in self._open.values():
            os.close(handle)

    def read(self, file: int, start: int, size: int) -> bytes:
        """`size` bytes from byte `start` on.

        Raises:
            DataError: the file is gone, shorter, or another than when it was first opened.
        """
        try:
            raw = os.pread(self._handle(file), size, start)
            while len(raw) < size and (more := os.pread(self._handle(file), size - len(raw), start + len(raw))):
                raw += more
        except OSError as e:
            raise self._unreadable(file, e.strerror or str(e)) from e
        if len(raw) < size:
            raise self._unreadable(file, f"it ends after {start + len(raw):,} of {start + size:,} bytes")
        return raw

    def _handle(self, file: int) -> int:
        if file not in self._open:
            while len(self._open) >= _MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            handle = os.open(self.files[file], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            seen = os.fstat(handle)
            if self._sizes.setdefault(file, (seen.st_size, seen.st_mtime_ns)) != (seen.st_size, seen.st_mtime_ns):
                os.close(handle)
                raise self._unreadable(file, "it has changed since it was first opened; start again")
            self._open[file] = handle
        return self._open[file]

    def _unreadable(self, file: int, reason: str) -> DataError:
        return DataError(f"cannot be read any more: {reason}", where=str(self.files[file]), kind="changed-file")
