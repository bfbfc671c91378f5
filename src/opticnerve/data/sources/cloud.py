"""Data files in a cloud: a file, a folder, or a pattern of files, brought into the cache folder once for each state of
them; or, of a stream, one at a time, of which nothing is kept.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from opticnerve.common import atomic
from opticnerve.common.cache import alone, cache_dir
from opticnerve.data.media.cloud import explained, filesystem
from opticnerve.data.sources.paths import braces
from opticnerve.types import DataError, OpticNerveError

_AT_ONCE = 32
"""Files that are asked for side by side."""
_STATES = ("ETag", "etag", "blob_id", "md5Hash", "mtime", "LastModified", "last_modified", "created")
"""What says, in one package or another, that a file is another than before."""
_UNUSED = 30 * 86_400
"""Seconds after which an earlier state of an address's files is removed, if nothing has read it meanwhile."""


class CloudFiles:
    """The files that an address names. `root`: the folder, within the file system, from which their paths start;
    `inside`: the address from there on, a pattern where it is one; `states`: by path, bytes and what changes with the
    content.

    Raises:
        DataError: there is none (kind `missing-file`). OpticNerveError: that cannot be told.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.system, inner = filesystem(path)
        inner = inner.rstrip("/")
        fixed = [*takewhile(lambda part: not _is_pattern(part), inner.split("/"))]
        self.is_pattern = _is_pattern(inner)
        self.root = "/".join(fixed) if self.is_pattern else posixpath.dirname(inner)
        self.inside = inner[len(self.root) :].lstrip("/")
        try:
            found = self._found(inner)
        except Exception as e:  # whatever its package raises
            raise explained(e, path) from e
        self.states = {name: _state(about) for name, about in sorted(found.items()) if about.get("type") == "file"}
        if not self.states:
            raise explained(FileNotFoundError(), path)
        if strange := next((name for name in self.states if ".." in name.split("/")), None):
            problem = f"{path[:200]} holds {strange[:200]}, which leads out of its folder"
            raise OpticNerveError(f"{problem}; name another folder, or the files themselves", kind="unsupported")

    def _found(self, inner: str) -> dict[str, Any]:
        if not self.is_pattern:
            about = self.system.info(inner)
            if about["type"] == "file":  # of which adlfs's `find` tells the name alone
                return {about["name"]: about}
            return dict(self.system.find(inner, detail=True))
        there, kept = dict(self.system.find(self.root, detail=True)) if "{" in inner else {}, dict[str, Any]()
        for name in braces(inner):
            if any(sign in name for sign in "*?["):
                kept |= self.system.glob(name, detail=True)
            elif name not in there:  # before any is fetched
                raise DataError(
                    f"there is no {name[:200]}", where=self.path, remedy="check the path", kind="missing-file"
                )
            else:
                kept[name] = there[name]
        return kept

    def below(self, folder: Path, name: str) -> Path:
        return folder / name[len(self.root) :].lstrip("/")

    def get(self, names: list[str], folder: Path) -> None:
        """Bring files below a folder, each whole or not at all."""
        for start in range(0, len(names), _AT_ONCE):
            some = names[start : start + _AT_ONCE]
            partial = [atomic.partial_of(folder / str(number)) for number in range(len(some))]
            with atomic.room_for(self.path, sum(self.states[name][0] for name in some), folder):
                try:
                    self.system.get(some, [str(file) for file in partial])
                except Exception as e:  # as above
                    if isinstance(e, OSError) and e.errno in atomic.FULL:
                        raise
                    raise explained(e, self.path) from e
            for name, file in zip(some, partial, strict=True):
                if file.stat().st_size != self.states[name][0]:
                    raise explained(EOFError(f"{name} broke off after {file.stat().st_size:,} bytes"), self.path)
                target = self.below(folder, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.rename(target)


def local_copy(path: str) -> Path:
    """Where the files of an address lie on this machine once they are here; of a pattern, the pattern.

    Raises:
        OpticNerveError: they cannot be had. DataError: there is none (kind `missing-file`).
    """
    found = CloudFiles(path)
    # Errors name a file by where it lies: its bucket shall be told.
    address = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{path.partition('://')[0]}/{found.root}")[:120]
    states = cache_dir() / "remote" / address / _digest(path)
    folder = states / _digest("\n".join(f"{name} {state}" for name, state in found.states.items()))
    with alone(folder, f"{folder} cannot be written", "let OPTICNERVE_CACHE name a folder that can be"):
        files = folder / "files"
        files.mkdir(exist_ok=True)
        atomic.clear_left_overs(files)
        found.get([name for name in found.states if not found.below(files, name).exists()], files)
    for lock in states.glob("*/lock"):  # `alone` has opened it for writing whenever its state was used
        with suppress(FileNotFoundError):  # another process removes the same one
            if lock.parent != folder and time.time() - lock.stat().st_mtime > _UNUSED:
                shutil.rmtree(lock.parent, ignore_errors=True)
    return files / found.inside


@contextmanager
def for_a_while(path: str) -> Iterator[Path]:
    """A file of a cloud, on this machine until the block is left."""
    with tempfile.TemporaryDirectory(prefix="opticnerve-") as made:
        found = CloudFiles(path)
        found.get(list(found.states), Path(made))
        yield Path(made) / found.inside


def _state(about: dict[str, Any]) -> tuple[int, str]:
    return int(about.get("size") or 0), str(next((about[key] for key in _STATES if about.get(key)), ""))


def _digest(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _is_pattern(path: str) -> bool:
    return any(sign in path for sign in "*?[{")
