"""Where opticnerve keeps what it can make again: dequantised weights, unpacked data, fingerprints of files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from opticnerve.common import atomic
from opticnerve.types import OpticNerveError


def cache_dir() -> Path:
    """`$OPTICNERVE_CACHE`, else `$XDG_CACHE_HOME/opticnerve`, else `~/.cache/opticnerve`; made if missing."""
    root = os.environ.get("OPTICNERVE_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "opticnerve"
    base.mkdir(parents=True, exist_ok=True)
    return base


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name once the block has ended well: all of it or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent, ignore_cleanup_errors=True) as made:
        inner = Path(made) / "new"
        inner.mkdir()
        yield inner
        try:
            inner.rename(target)
        except OSError:
            if not target.is_dir():  # another process may have finished first; its folder is as good
                raise


@contextlib.contextmanager
def alone(folder: Path, problem: str, remedy: str) -> Iterator[None]:
    """One at a time, among all threads and processes that want this folder, which is made if missing; the system lets
    go of it when a process dies.

    Raises:
        OpticNerveError: it cannot be written; `problem` and `remedy` say what that means.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as e:
        raise OpticNerveError(f"{problem}: {e.strerror or e}; {remedy}", kind="no-permission") from e
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def weight_files(folder: Path) -> list[str]:
    """The files that transformers and timm read a local folder's weights from: safetensors, else torch's own."""
    found = sorted(folder.glob("*.safetensors")) or sorted([*folder.glob("*.bin"), *folder.glob("*.pth")])
    return [str(f) for f in found]


def fingerprint(files: Iterable[str | Path]) -> str:
    """SHA-256 over the contents of weight files, in name order."""
    total = hashlib.sha256()
    for file in sorted(map(Path, files), key=lambda f: f.name):
        total.update(sha256_of(file).encode())
    return total.hexdigest()


def sha256_of(file: Path) -> str:
    """SHA-256 of a large file; remembered by path, size and time of change."""
    memory = cache_dir() / "fingerprints.json"
    try:
        known: dict[str, str] = json.loads(memory.read_text())
    except (OSError, json.JSONDecodeError):
        known = {}
    stat = file.stat()
    key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    if key not in known:
        known[key] = atomic.sha256(file)
        atomic.write_json(memory, known)
    return known[key]
