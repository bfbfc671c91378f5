"""Checkpoints that are whole or not there: written beside, synced, renamed; recognised by the hashes of their files."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from opticnerve.types import OpticNerveError

STATE, SUMS = "state.pt", "sha256.json"


def save(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `checkpoint-<step>` under `folder` and remove all but the newest `keep`.

    `state` holds tensors and plain values only: it is read back with `weights_only=True`.
    """
    target = folder / f"checkpoint-{step:08d}"
    partial = folder / f".writing-{target.name}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with (partial / STATE).open("wb") as f:
            torch.save({**state, "step": step}, f)
            f.flush()
            os.fsync(f.fileno())
        with (partial / SUMS).open("w") as f:
            json.dump({STATE: _sha256(partial / STATE)}, f)
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        shutil.rmtree(partial, ignore_errors=True)
        raise OpticNerveError(f"could not write a checkpoint to {folder}: {e}; the one before it is whole") from e
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Complete-looking checkpoints, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{8}", p.name)]
    return sorted(found)


def newest(folder: Path, *, warn: Any = print) -> dict[str, Any] | None:
    """The state of the newest whole checkpoint; torn ones are passed over, loudly."""
    for path in reversed(checkpoints(folder)):
        try:
            wanted = json.loads((path / SUMS).read_text())[STATE]
            if _sha256(path / STATE) != wanted:
                raise ValueError("its file does not match its hash")
            state: dict[str, Any] = torch.load(path / STATE, map_location="cpu", weights_only=True)
            return state
        except (OSError, ValueError, KeyError) as e:
            warn(f"passing over the torn checkpoint {path}: {e}")
    return None


def rng_state() -> dict[str, Any]:
    """Torch's and Python's generators, as tensors and plain values."""
    version, words, gauss = random.getstate()
    return {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
