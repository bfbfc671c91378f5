"""Read a run folder as it is, finished or not: what is missing is empty here, what is broken is an error."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opticnerve.types import DataError, OpticNerveError


@dataclass(frozen=True, slots=True)
class StageRecord:
    """One stage on disk: the table of what trained, the steps, and its closing line from results.json if it has one."""

    name: str
    folder: Path
    freeze: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return bool(self.summary)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run folder's records."""

    path: Path
    recipe: str | None
    results: dict[str, Any]
    stages: list[StageRecord]


def read_run(path: Path) -> RunFolder:
    """Read the folder that a run has written so far.

    Raises:
        OpticNerveError: there is no such folder, or a JSON file in it is broken (other than a last line of metrics that
            was cut off while being written).
    """
    path = Path(path)
    if not path.is_dir():
        raise OpticNerveError(f"{path} is no run folder: there is no such folder")
    results = _read_json(path / "results.json")
    summaries = {s.get("name"): s for s in results.get("stages") or []}
    recipe = path / "recipe.yaml"
    return RunFolder(
        path,
        recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        results,
        [_read_stage(folder, summaries) for folder in _stage_folders(path)],
    )


def _stage_folders(path: Path) -> list[Path]:
    folders = [f for f in (path / "stages").glob("*") if f.is_dir() and f.name.split("-")[0].isdigit()]
    return sorted(folders, key=lambda f: int(f.name.split("-")[0]))


def _read_stage(folder: Path, summaries: dict[Any, dict[str, Any]]) -> StageRecord:
    name = folder.name.partition("-")[2] or folder.name
    return StageRecord(
        name,
        folder,
        _read_json(folder / "freeze.json"),
        read_metrics(folder / "metrics.jsonl"),
        summaries.get(name, {}),
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a stage, in order; of a step trained twice (after a resume) the later record counts."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            steps[int(record["step"])] = record
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as e:
            if number == len(lines):
                break  # the run was stopped in the middle of this line; every finished step is there
            raise DataError(f"not a training step: {e}", where=f"{path}:{number}", remedy="delete the line") from e
    return [steps[s] for s in sorted(steps)]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise OpticNerveError(f"{path} is not readable JSON: {e}; delete it and run `opticnerve eval` again") from e
    if not isinstance(loaded, dict):
        raise OpticNerveError(f"{path} should hold a JSON object, not {type(loaded).__name__}")
    return loaded


def finite(value: Any) -> float:
    """The number, or NaN for what is none: JSON has no word for infinity, and a step may lack a record."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan
