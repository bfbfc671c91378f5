"""Checkpoints that are whole or not there: written beside, synced, renamed; recognised by the hashes of their files."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.device_mesh import DeviceMesh

from opticnerve.common import atomic
from opticnerve.train import sharded
from opticnerve.train.sharded import SHARDS
from opticnerve.types import OpticNerveError

STATE, SUMS = "state.pt", "sha256.json"
_NAME = re.compile(r"checkpoint-(\d{8})(?:\.(\d+))?")


def save(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2, shards: Path | None = None) -> Path:
    """Write `checkpoint-<step>` under `folder`; then all but the newest `keep` go, and torn ones.

    One of the same step stays until the new one is whole, which is then called `checkpoint-<step>.1`: in no moment
    there is none.

    Args:
        state: tensors and plain values only: it is read back with `weights_only=True`.
        shards: a folder beside, of what was taken out of the state (`train.sharded`), which the checkpoint takes in.

    Raises:
        DiskFull: it does not fit; the message says how much is missing. OpticNerveError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    atomic.clear_left_overs(folder)
    before = checkpoints(folder)
    again = [_step_of(p)[1] + 1 for p in before if _step_of(p)[0] == step]
    target = folder / (f"checkpoint-{step:08d}" + (f".{max(again)}" if again else ""))
    partial = atomic.partial_of(target)
    kept = f"{before[-1].name} is whole" if before else "there is none before it"
    try:
        with atomic.room_for("a checkpoint", size_of(state), folder, remedy=f"{kept}; free some space and resume"):
            partial.mkdir()
            if shards is not None:
                shards.rename(partial / SHARDS)
            _write(partial, {**state, "step": step})
            partial.rename(target)
    except OSError as e:
        raise OpticNerveError(f"could not write a checkpoint to {folder}: {e}; {kept}", kind="no-permission") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    atomic.sync(folder)
    # Later steps are of a life that took another way.
    good = [p for p in checkpoints(folder) if _step_of(p)[0] <= step and (p == target or looks_whole(p))]
    for old in set(checkpoints(folder)) - set(good[-keep:]):
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """All of them, oldest first; which are whole, `newest` says."""
    return sorted((p for p in folder.glob("checkpoint-*") if _NAME.fullmatch(p.name)), key=_step_of)


def newest(folder: Path, *, warn: Callable[[str], Any] = print, most: int | None = None) -> dict[str, Any] | None:
    """The state of `newest_whole`."""
    found = newest_whole(folder, warn=warn, most=most)
    return None if found is None else read(found)


def newest_whole(folder: Path, *, warn: Callable[[str], Any] = print, most: int | None = None) -> Path | None:
    """The newest whole checkpoint; torn ones are passed over, loudly. None where there never was one.

    Args:
        most: the last step whose metrics are there; later checkpoints are passed over, too.

    Raises:
        OpticNerveError: there are checkpoints, and none of them can be used.
    """
    wrong = []
    for path in reversed(checkpoints(folder)):
        try:
            if most is not None and _step_of(path)[0] > most:
                raise ValueError(f"metrics.jsonl ends with step {most}")
            check(path)
            return path
        except (OSError, ValueError) as e:
            warn(f"passing over the checkpoint {path}, it cannot be used: {e}")
            wrong.append(f"{path.name}: {e}")
    if wrong:
        raise OpticNerveError(
            f"none of the checkpoints in {folder} can be used ({'; '.join(wrong)}). Bring one back from a copy; or "
            f"delete {folder}, and the stage begins anew",
            kind="damaged",
        )
    return None


def load(path: Path) -> dict[str, Any]:
    """The state that a checkpoint holds, all of it whole, if the files are those that were written.

    Raises:
        ValueError, OSError: it is torn or damaged; the message says how.
    """
    check(path)
    return read(path)


def check(path: Path) -> None:
    """See that a checkpoint is what was written.

    Raises:
        ValueError, OSError: it is torn or damaged; the message says how.
    """
    for name, known in _sums(path).items():
        if (found := atomic.sha256(path / name)) != known["sha256"]:
            raise ValueError(f"{name} has the SHA-256 {found[:12]}…, {SUMS} says {known['sha256'][:12]}…")
    _state(path, mmap=True)


def read(path: Path, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """The state that a checkpoint holds, as `load`; its hashes are not looked at.

    Args:
        mesh: of the processes that call it, which get what was written in shards in shards.

    Where files in use can be removed (POSIX), what was written whole is mapped from its file: it is copied to where it
    belongs, and does not stand in memory beside it.
    """
    state = _state(path, mmap=os.name == "posix")
    if names := sharded.names(state):
        return sharded.put_back(state, sharded.read(path / SHARDS, names, mesh))
    return state


def _state(path: Path, *, mmap: bool) -> dict[str, Any]:
    step = _step_of(path)[0]
    try:
        state: object = torch.load(path / STATE, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as e:  # a damaged archive with a damaged pickle in it: there is no end to what torch raises
        raise ValueError(f"{STATE} cannot be read: {type(e).__name__}: {str(e).partition(chr(10))[0]}") from e
    if not isinstance(state, dict) or state.get("step") != step:
        raise ValueError(f"{STATE} is not the state of step {step}")
    return state


def looks_whole(path: Path) -> bool:
    """Whether the state is there in its size: what can be told without reading it."""
    try:
        return all((path / name).stat().st_size == known["bytes"] for name, known in _sums(path).items())
    except (OSError, ValueError):
        return False


def size_of(state: object) -> int:
    """About the bytes that a state takes on disk: its tensors', and something for the archive around each."""
    if isinstance(state, torch.Tensor):
        return state.nbytes + 256
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return 16 + sum(map(size_of, inner))


def rng_state(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Torch's and Python's generators, and the accelerator's, as tensors and plain values."""
    version, words, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}
    kind = torch.device(device).type
    return state if kind == "cpu" else state | {kind: torch.get_device_module(kind).get_rng_state()}


def set_rng_state(state: dict[str, Any], device: torch.device | str = "cpu") -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind = torch.device(device).type
    if kind in state:  # written on a device of another kind, it has none for this one
        torch.get_device_module(kind).set_rng_state(state[kind])


def _write(folder: Path, state: dict[str, Any]) -> None:
    with (folder / STATE).open("xb") as file:
        guarded = _Writing(file)
        try:
            torch.save(state, guarded)  # type: ignore[arg-type]
        except RuntimeError as e:  # torch's archive writer hides what the disk said
            raise guarded.failed or e from e
        file.flush()
        os.fsync(file.fileno())
    files = [folder / STATE, *sorted((folder / SHARDS).glob("*"))]
    sums = {f.relative_to(folder).as_posix(): {"sha256": atomic.sha256(f), "bytes": f.stat().st_size} for f in files}
    atomic.write_json(folder / SUMS, sums)


class _Writing:
    """A file to write to, which remembers why it could not."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.flush = file, file.flush
        self.failed: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            return self.file.write(data)
        except OSError as e:
            self.failed = self.failed or e
            raise


def _sums(path: Path) -> dict[str, dict[str, Any]]:
    """`sha256` and `bytes` of a checkpoint's state and of its shards, as its list of hashes has them."""
    try:
        sums = json.loads((path / SUMS).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{SUMS} is not readable JSON: {e}") from e
    if not isinstance(sums, dict) or STATE not in sums or not all(map(_is_sum, sums.items())):
        raise ValueError(f"{SUMS} does not list {STATE} and shards alone, with their sha256 and bytes")
    return {name: {**known, "sha256": str(known["sha256"])} for name, known in sums.items()}


def _is_sum(listed: tuple[str, object]) -> bool:
    name, known = listed
    ours = name == STATE or re.fullmatch(rf"{SHARDS}/[\w.-]+", name) is not None
    return ours and isinstance(known, dict) and known.keys() == {"sha256", "bytes"}


def _step_of(path: Path) -> tuple[int, int]:
    """Step, and which one of that step."""
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1]), int(found[2] or 0)
