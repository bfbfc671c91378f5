"""Places in which a run kills itself, by SIGKILL, so that nothing can be tidied up."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import opticnerve.common.atomic as durable
import opticnerve.features.shards as feature_shards
import opticnerve.models.checkpoint.delta as delta
import opticnerve.runs.folder as run_folder
import opticnerve.train.checkpoint as checkpoint
from opticnerve.train.metrics import MetricsLog


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at(number: int, owner: Any, name: str, meet: Callable[..., Any], when: Callable[..., bool] | None = None) -> None:
    """Have `meet(original, *args)` take the `number`-th call (from 1) of a function, among those that `when` wants."""
    original, left = getattr(owner, name), [number]

    def watched(*args: Any, **options: Any) -> Any:
        if when is None or when(*args, **options):
            left[0] -= 1
            if left[0] == 0:
                return meet(original, *args, **options)
        return original(*args, **options)

    setattr(owner, name, watched)


def _half_a_tensor_file(original: Any, tensors: Any, path: Path, **options: Any) -> None:
    original(tensors, path, **options)
    os.truncate(path, Path(path).stat().st_size // 2)
    die()


def _half_a_write(original: Any, writing: Any, data: Any) -> None:
    original(writing, bytes(data)[: len(data) // 2])
    writing.file.flush()
    die()


def _before(original: Any, *args: Any, **options: Any) -> None:
    die()


def _after(original: Any, *args: Any, **options: Any) -> None:
    original(*args, **options)
    die()


def _half_a_line(original: Any, log: MetricsLog, line: dict[str, Any]) -> None:
    log._file.write(f'{{"step": {line["step"]}, "lo'.encode())
    die()


def _named(name: str) -> Callable[..., bool]:
    return lambda path, *_, **__: Path(path).name == name


# Name → what is done in the process that shall die; each takes the number of the call.
FAULTS: dict[str, Callable[[int], None]] = {
    "in mid-checkpoint": lambda n: _at(3 * n, checkpoint._Writing, "write", _half_a_write),
    "a checkpoint without its hashes": lambda n: _at(n, durable, "write_json", _before, _named(checkpoint.SUMS)),
    "a whole checkpoint not yet in its place": lambda n: _at(n, durable, "write_json", _after, _named(checkpoint.SUMS)),
    "before the old checkpoints go": lambda n: _at(n, checkpoint, "looks_whole", _before),
    "in mid-cache-write": lambda n: _at(n, feature_shards, "save_file", _half_a_tensor_file),
    "in mid-line of metrics": lambda n: _at(n, MetricsLog, "write", _half_a_line),
    "in mid-weights at a stage's end": lambda n: _at(n, delta, "save_file", _half_a_tensor_file),
    "a stage's weights without its result": lambda n: _at(n, durable, "write_json", _before, _named(run_folder.RESULT)),
    "after a stage's result": lambda n: _at(n, durable, "write_json", _after, _named(run_folder.RESULT)),
    "in mid-publishing": lambda n: _at(2 * n, durable, "copy", _after),
    "before results.json": lambda n: _at(n, durable, "write_json", _before, _named("results.json")),
}
