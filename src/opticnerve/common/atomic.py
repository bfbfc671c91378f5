"""Files that are whole or not there, whatever kills the process or the machine in between.

A file is written beside its place under a name of its own, synced, renamed, and the folder synced: a rename replaces
the old file in one moment, and what has been synced survives a power cut (see `rename(2)` and `fsync(2)`). What a
killed process left half written is known by its name and cleared away.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from opticnerve.common.units import format_bytes
from opticnerve.types import OpticNerveError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ABANDONED = 24 * 3600
"""Seconds after which what another machine began to write is taken for left over."""


class DiskFull(OpticNerveError):
    """There is no room for what was to be written; what stood there before is whole."""

    kind = "disk-full"


@contextmanager
def _whole(path: Path, size: int) -> Iterator[Path]:
    """Where `size` bytes are to be written, which take the place of `path` behind the block."""
    with room_for(path.name, size, path.parent), replacing(path) as partial:
        yield partial
    sync(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of `path` behind the block; nothing is left of it if the block breaks."""
    partial = partial_of(path)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write(path: Path, content: str | bytes) -> None:
    """Put `content` (text as UTF-8) in the place of a file, all of it or nothing.

    Raises:
        DiskFull: it does not fit. OSError: it cannot be written for another reason.
    """
    data = content.encode() if isinstance(content, str) else content
    with _whole(path, len(data)) as partial:
        partial.write_bytes(data)


def write_json(path: Path, value: object, **options: Any) -> None:
    """`value` as JSON of one space's indent; `options` go to `json.dumps`."""
    write(path, json.dumps(value, indent=1, **options) + "\n")


def write_lines(path: Path, rows: Iterable[Any], **options: Any) -> None:
    """Each of `rows` as JSON on a line of its own; `options` go to `json.dumps`."""
    write(path, "".join(json.dumps(row, **options) + "\n" for row in rows))


def copy(source: Path, target: Path) -> None:
    """A copy that takes its place once it is whole."""
    with _whole(target, source.stat().st_size) as partial:
        shutil.copy2(source, partial)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk before going on."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there, nor what is only read be synced
        return
    opened = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def partial_of(path: Path) -> Path:
    """Where something is written before it takes the place of `path`: a hidden name beside it, this process's own."""
    return path.with_name(f".writing-{path.name}-{platform.node()}-{os.getpid()}")


def clear_left_overs(folder: Path) -> None:
    """Remove what processes that are gone have begun to write in a folder."""
    mine = re.compile(rf"\.writing-.+-{re.escape(platform.node())}-(\d+)")
    for path in folder.glob(".writing-*"):
        ours = mine.fullmatch(path.name)
        if not psutil.pid_exists(int(ours[1])) if ours else time.time() - path.stat().st_mtime > _ABANDONED:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def room_for(what: str, needed: int, folder: Path, *, remedy: str = "free some space") -> Iterator[None]:
    """Within it, about `needed` bytes are written in `folder`; that they do not fit is told in numbers.

    Raises:
        DiskFull: they do not fit, by what the disk says before or by what writing comes to.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise _full(what, needed, free, folder, remedy)
    try:
        yield
    except OSError as e:
        if e.errno in FULL:
            raise _full(what, needed, shutil.disk_usage(folder).free, folder, remedy, e.strerror) from e
        raise


def _full(what: str, needed: int, free: int, folder: Path, remedy: str, said: str | None = None) -> DiskFull:
    missing = f", so {format_bytes(needed - free)} are missing" if needed > free else ""
    return DiskFull(
        f"{what} could not be written{f' ({said})' if said else ''}: it takes {format_bytes(needed)}, and "
        f"{format_bytes(free)} are free in {folder}{missing}; {remedy}"
    )
