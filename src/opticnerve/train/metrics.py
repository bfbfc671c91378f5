"""metrics.jsonl: one line a step, without gaps or repeats, whatever ended the lives of the run before; and what is
counted of a step's batches for it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import count
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from opticnerve.common import atomic
from opticnerve.models.vlm.tower import MEDIA_INPUT
from opticnerve.recipe import DataSpec

METRICS = "metrics.jsonl"


def steps_in(path: Path) -> int:
    """How many steps, from the first one on, have a whole line; a last line that was cut off is none."""
    return len(_whole_lines(path))


class MetricsLog:
    """Context manager: `write` adds the line of a step.

    Args:
        steps: the lines to keep; those of steps that are done again are dropped, and a torn one.
    """

    def __init__(self, path: Path, steps: int) -> None:
        self.path = path
        kept = _whole_lines(path)[:steps]
        atomic.write(path, b"".join(line + b"\n" for line in kept))

    def __enter__(self) -> Self:
        self._file = self.path.open("ab", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def write(self, line: dict[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        with atomic.room_for("a line of metrics.jsonl", len(data), self.path.parent):
            while data:  # a disk that is nearly full takes a part
                data = data[self._file.write(data) :]

    def sync(self) -> None:
        """Have all lines on the disk: a checkpoint is never ahead of them."""
        os.fsync(self._file.fileno())


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of steps 1, 2, …, up to the first that is torn, missing or of another step."""
    if not path.is_file():
        return []
    good: list[bytes] = []
    for step, line in zip(count(1), path.read_bytes().split(b"\n"), strict=False):
        try:
            if json.loads(line)["step"] != step:
                break
        except (ValueError, KeyError, TypeError):
            break
        good.append(line)
    return good


def fill(batches: Sequence[Any]) -> dict[str, float]:
    """The share of this process's positions that hold a token and no padding."""
    places = sum(getattr(b, "places", 0) for b in batches)
    return {"fill": round(sum(b.tokens for b in batches) / places, 4)} if places else {}


def media_counts(batches: Sequence[Any]) -> list[int]:
    """Pieces of media in a step's batches, by modality."""
    given = [getattr(b, "media", {}) for b in batches]
    counts = []
    for modality, key in MEDIA_INPUT.items():
        seen = [len(media[f"{modality}_features"].mask_BN) for media in given if f"{modality}_features" in media]
        counts.append(sum(seen) + sum(len(media[key]) for media in given if key in media))
    return counts


def source_names(specs: Sequence[DataSpec]) -> list[str]:
    """What the data entries of a stage are called in its metrics: by their files, numbered where two are alike."""
    names = [Path(spec.path).name or spec.path for spec in specs]
    return [n if names.count(n) == 1 else f"{n} #{names[: i + 1].count(n)}" for i, n in enumerate(names)]


def source_counts(batches: Sequence[Any], sources: int) -> list[int]:
    """What the loss of a step's batches is a mean over (tokens, or samples), by the data entry that it is of; nothing
    where batches do not say, or there is one entry."""
    if sources < 2 or any(getattr(b, "sources", None) is None for b in batches):
        return [0] * sources
    found = torch.zeros(sources, dtype=torch.int64)
    for batch in batches:
        found += torch.bincount(batch.loss_sources, minlength=sources)
    counts: list[int] = found.tolist()
    return counts


def by_source(names: Sequence[str], losses: Sequence[float], counts: Sequence[int], unit: str) -> dict[str, Any]:
    """The mean loss over each source's tokens, or samples (`unit`), for those that the step held."""
    shown = zip(names, losses, counts, strict=True)
    found = {name: {"loss": loss / count, unit: count} for name, loss, count in shown if count and isfinite(loss)}
    return {"by_source": found} if found else {}


def tracked(line: Mapping[str, Any], above: str = "") -> dict[str, float]:
    """All numbers of a line for a tracker: those of `learning_rate`, `validation` and the like by `key/inner key`."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            found |= tracked(value, f"{above}{key}/")
        elif isinstance(value, int | float) and key != "step":
            found[above + key] = value
    return found
