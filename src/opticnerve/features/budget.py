"""How much disk the frozen vision encoders' features may take, and who goes first when it is full.

The folder `features` holds one store for each vision encoder (see `features.store`). A budget bounds the whole of it,
before anything is written: stores of other vision encoders are removed, the least recently used first, unless a process
reads them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from opticnerve.common.cache import cache_dir
from opticnerve.common.units import format_bytes
from opticnerve.types import OpticNerveError

BUDGET = "OPTICNERVE_FEATURE_BUDGET"
"""Environment variable: the budget of a stage that names none, such as `50GB`."""
_MOST = 20_000_000_000
_MARK = ".in-use"
_NAME = 24  # hexadecimal digits in a store's name


def features_dir() -> Path:
    """The folder of all stores: `features` in opticnerve's cache."""
    return cache_dir() / "features"


def default_budget(root: Path) -> int:
    """Bytes: `$OPTICNERVE_FEATURE_BUDGET`, else 20 GB or a tenth of the disk that is free (or in `root` already),
    whichever is less.

    Raises:
        OpticNerveError: the variable holds no size.
    """
    given = os.environ.get(BUDGET)
    if given is None:
        return min(_MOST, (free_bytes(root) + folder_bytes(root)) // 10)
    try:
        return int(TypeAdapter(ByteSize).validate_python(given))
    except ValidationError as e:
        raise OpticNerveError(
            f"{BUDGET} is {given!r}, which is no size; write for example 50GB", kind="wrong-type"
        ) from e


def evict(root: Path, keep: Path, needed: int, budget: int) -> None:
    """See to it that `needed` more bytes fit under `root`, by removing stores other than `keep`.

    Nothing is removed where that would not be enough.

    Raises:
        OpticNerveError: they do not fit into the budget, or not onto the disk; both numbers and the remedies.
    """
    over = max(folder_bytes(root) + needed - budget, needed - free_bytes(root))
    if over <= 0:
        return
    goes: list[tuple[Path, Any]] = []
    for store in sorted((s for s in _stores(root) if s != keep), key=_last_used):
        if over > 0 and (lock := _alone(store)) is not None:
            goes.append((store, lock))
            over -= folder_bytes(store)
    for store, lock in goes:
        if over <= 0:
            _remove(store)
        lock.close()
    if over > 0:
        own = folder_bytes(keep)
        free, most = format_bytes(free_bytes(root)), format_bytes(budget)
        kept = f"; {format_bytes(own)} are this vision encoder's already ({keep})" if own else ""
        raise OpticNerveError(
            f"the frozen vision encoder's features need {format_bytes(needed)} more of disk; the feature cache may "
            f"hold {most} and {free} of disk are free{kept}. Raise the budget (cache_features: {{budget: 50GB}}, or "
            f"{BUDGET}), store them in half the space (cache_features: {{dtype: bfloat16}}, for a float32 vision "
            "encoder), or leave cache_features out",
            kind="disk-full",
        )


def hold(store: Path) -> Any:
    """Mark a store as used, now and until the object that is returned is closed or collected.

    Whoever is alone with it clears away what killed processes left half written.

    Raises:
        OpticNerveError: the folder cannot be written or locked.
    """
    try:
        import fcntl

        while True:
            store.mkdir(parents=True, exist_ok=True)
            mark = (store / _MARK).open("a")
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for partial in store.glob(".*.partial"):
                    partial.unlink(missing_ok=True)
            fcntl.flock(mark, fcntl.LOCK_SH)
            if (store / _MARK).exists():
                os.utime(mark.fileno())
                return mark
            mark.close()  # it was removed under our hands
    except (OSError, ModuleNotFoundError) as e:  # there is no fcntl but on POSIX
        raise OpticNerveError(
            f"the feature cache {store} cannot be used: {e}; let OPTICNERVE_CACHE name a folder on a disk that can be "
            f"written and locked, or leave cache_features out",
            kind="no-permission",
        ) from e


def folder_bytes(folder: Path) -> int:
    """What the files below a folder take. (Files that others remove meanwhile count as nothing.)"""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not be there yet."""
    there = next(f for f in (folder, *folder.parents) if f.exists())
    return shutil.disk_usage(there).free


def _stores(root: Path) -> list[Path]:
    """Folders that carry the name of a store: nothing else is ever removed."""
    found = root.iterdir() if root.is_dir() else ()
    return [f for f in found if f.is_dir() and len(f.name) == _NAME and set(f.name) <= set("0123456789abcdef")]


def _last_used(store: Path) -> float:
    mark = store / _MARK
    return (mark if mark.exists() else store).stat().st_mtime


def _alone(store: Path) -> Any | None:
    """A lock on a store that no process uses; None where one does."""
    import fcntl

    lock = (store / _MARK).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def _remove(store: Path) -> None:
    for file in [*store.glob("*.safetensors"), *store.glob(".*.partial"), store / _MARK]:
        file.unlink(missing_ok=True)
    try:
        store.rmdir()
    except OSError as e:  # somebody put a file of his own there, or a new store begins
        if not store.exists() or any(store.iterdir()):
            return
        raise OpticNerveError(f"{store} cannot be removed: {e}; delete it", kind="no-permission") from e
