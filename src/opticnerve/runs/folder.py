"""A run folder: what a run keeps beside the weights, and how it is read, finished or not.

Each file is whole or not there, so that a run that is killed between any two of them goes on where it was. To a reader,
what is missing is empty, and what is broken is an error.
"""

from __future__ import annotations

import datetime
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opticnerve import recipe as recipes
from opticnerve.common import atomic
from opticnerve.models.checkpoint.readme import README
from opticnerve.models.vlm.continued import pinned, pinned_as
from opticnerve.recipe import ModelSpec, Recipe
from opticnerve.train.checkpoint import checkpoints
from opticnerve.types import DataError, OpticNerveError, RecipeError

RECIPE, RESULTS, RESULT = "recipe.yaml", "results.json", "result.json"
# Of a stage's folder: what is no part of its model.
_NO_MODEL = ("freeze.json", "metrics.jsonl", "diverged.jsonl", RESULT, README)


# -- written ----------------------------------------------------------------------------------------------------------


class Results:
    """results.json, written whole after each finding.

    Args:
        fresh: begin with none. writes: False for a process beside the one that writes.

    Raises:
        OpticNerveError: the one to go on with is damaged.
    """

    def __init__(self, path: Path, *, fresh: bool, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.data = {} if fresh else _read(path, "delete it: what it held is measured again")

    def set(self, key: str, value: object) -> None:
        self.data[key] = value
        self.write()

    def write(self) -> None:
        if self.writes:
            atomic.write_json(self.path, self.data, default=str)


def keep_recipe(recipe: Recipe, run_dir: Path, resume: bool) -> Recipe:
    """Write the recipe into the run folder, or see that it is the one that is there; returns what the run goes by.

    A chat template that writes today's date writes the day on which the run began, however long it takes; what the run
    goes on from (`from`) is noted with its hash, and must stay the same.

    A recipe that differs in how long stages are is taken, too, and written once the stage goes on (`lengthen`).

    Raises:
        OpticNerveError: it differs; the message names the keys, with both values.
    """
    path = run_dir / RECIPE
    if not (resume and path.is_file()):
        recipe = pinned(recipe.dated(datetime.date.today()))
        atomic.write(path, recipes.dump(recipe))
        return recipe
    try:
        kept = recipes.load(path)
    except RecipeError as e:
        raise OpticNerveError(
            f"{e}\n{path} is of another version of opticnerve, or was changed by hand", kind="recipe"
        ) from e
    if isinstance(kept.model, ModelSpec) and kept.docked.language.date is not None:
        recipe = recipe.dated(kept.docked.language.date)
    recipe = pinned_as(recipe, kept)
    lines = differences(kept.model_dump(mode="json"), recipe.model_dump(mode="json"))
    if lines and not _lengthened(kept, recipe, run_dir):
        raise OpticNerveError(
            f"{run_dir} was begun with another recipe: {'; '.join(lines)}. Go on with its own by `opticnerve train "
            f"--resume {run_dir}`, or choose another --out",
            kind="mismatch",
        )
    return recipe


def differences(was: object, now: object, key: str = "") -> list[str]:
    """`key: a there, b given` for every value in which two recipes differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        inner = [(f"{key}.{k}" if key else str(k), was.get(k), now.get(k)) for k in {**was, **now}]
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        inner = [(f"{key}.{i}", *pair) for i, pair in enumerate(zip(was, now, strict=True))]
    else:
        return [] if was == now else [f"{key}: {was!r} there, {now!r} given"]
    return [line for place, a, b in inner for line in differences(a, b, place)]


def _lengthened(kept: Recipe, recipe: Recipe, run_dir: Path) -> bool:
    """Whether two recipes differ in how long stages are alone.

    Raises:
        OpticNerveError: they do, and such a stage cannot go on: a later one has begun from it, or it left no state.
    """
    if differences(_without_lengths(kept), _without_lengths(recipe)):
        return False
    for number in _other_lengths(kept, recipe):
        folder = stage_folder(run_dir, recipe, number)
        later = stage_folder(run_dir, recipe, number + 1) if number + 1 < len(recipe.stages) else None
        if later is not None and later.exists():
            raise OpticNerveError(
                f"stage {recipe.stages[number].name} cannot be made longer: {later} was begun from what it came "
                f"to. Go on from {folder} by a recipe with `model: {{from: {folder}}}`",
                kind="conflict",
            )
        if (folder / RESULT).is_file() and not checkpoints(folder):
            raise OpticNerveError(
                f"stage {recipe.stages[number].name} is finished and kept no checkpoint to go on from (it had no "
                f"`save_every`). Go on from what it came to by a recipe with `model: {{from: {run_dir}}}`",
                kind="missing-file",
            )
    return True


def lengthened_stages(recipe: Recipe, run_dir: Path) -> list[int]:
    """Numbers of the stages that are of another length than in the recipe that the folder has."""
    return _other_lengths(recipes.load(run_dir / RECIPE), recipe)


def _other_lengths(kept: Recipe, recipe: Recipe) -> list[int]:
    pairs = enumerate(zip(kept.stages, recipe.stages, strict=True))
    return [n for n, (was, now) in pairs if (was.steps, was.epochs) != (now.steps, now.epochs)]


def lengthen(recipe: Recipe, run_dir: Path, folder: Path) -> None:
    """From now on the run goes by this recipe, and the stage in `folder` is not finished."""
    (folder / RESULT).unlink(missing_ok=True)
    if (text := recipes.dump(recipe)) != (run_dir / RECIPE).read_text(encoding="utf-8"):
        atomic.write(run_dir / RECIPE, text)


def stage_folder(run_dir: Path, recipe: Recipe, number: int) -> Path:
    """Where a stage is kept."""
    return run_dir / "stages" / f"{number}-{recipe.stages[number].name}"


def _without_lengths(recipe: Recipe) -> dict[str, Any]:
    plain = recipe.model_dump(mode="json")
    return {**plain, "stages": [{**s, "steps": None, "epochs": None} for s in plain["stages"]]}


def finish_stage(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Have a stage's model on the disk, and then say that the stage is finished: result.json, with the model's hashes.

    Raises:
        DiskFull: there is no room left.
    """
    files = _model_files(folder)
    for file in files:
        atomic.sync(file)
    atomic.sync(folder)
    atomic.write_json(folder / RESULT, {**result, "files": {f.name: atomic.sha256(f) for f in files}})
    return result


def finished_stage(folder: Path) -> dict[str, Any] | None:
    """What a stage came to, if it is finished and its model is the one that it left.

    Raises:
        OpticNerveError: a file of its model is gone or another.
    """
    path, anew = folder / RESULT, "and the stage goes on from its newest checkpoint"
    if not path.is_file():
        return None
    result = _read(path, f"delete it, {anew}")
    for name, known in dict(result.pop("files")).items():
        file = folder / name
        found = atomic.sha256(file) if file.is_file() else "nothing"
        if found != known:
            raise OpticNerveError(
                f"{file} is not what the finished stage left: its SHA-256 was {known[:16]}…, found is {found[:16]}. "
                f"Bring it back from a copy; or delete {path}, {anew}",
                kind="mismatch",
            )
    return result


def publish(run_dir: Path, last: Path) -> None:
    """The run's own folder is the model of its last stage."""
    atomic.clear_left_overs(run_dir)
    for file in _model_files(last):
        atomic.copy(file, run_dir / file.name)
    if (last / README).is_file() and not (run_dir / README).exists():  # an older stage has none
        atomic.copy(last / README, run_dir / README)


def _model_files(folder: Path) -> list[Path]:
    return sorted(
        f for f in folder.iterdir() if f.is_file() and f.name not in _NO_MODEL and not f.name.startswith(".writing-")
    )


# -- read -------------------------------------------------------------------------------------------------------------


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
        raise OpticNerveError(f"{path} is no run folder: there is no such folder", kind="missing-file")
    results = _read(path / RESULTS, _REMEDY)
    summaries = {s.get("name"): s for s in results.get("stages") or []}
    found: dict[tuple[int, str], StageRecord] = {}
    for folder in (path / "stages").glob("*"):
        number, _, name = folder.name.partition("-")
        if folder.is_dir() and number.isdigit():
            name = name or folder.name
            freeze, metrics = _read(folder / "freeze.json", _REMEDY), read_metrics(folder / "metrics.jsonl")
            found[int(number), name] = StageRecord(name, folder, freeze, metrics, summaries.get(name, {}))
    recipe = path / RECIPE
    text = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    return RunFolder(path, text, results, [found[place] for place in sorted(found)])


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
        except (KeyError, TypeError, ValueError) as e:
            if number == len(lines):
                break  # the run was stopped in the middle of this line; every finished step is there
            where = f"{path}:{number}"
            raise DataError(f"not a training step: {e}", where=where, remedy="delete the line", kind="damaged") from e
    return [steps[s] for s in sorted(steps)]


def finite(value: object) -> float:
    """The number, or NaN for what is none: JSON has no word for infinity, and a step may lack a record."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


_REMEDY = "delete it and run `opticnerve eval` again"


def _read(path: Path, remedy: str) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(loaded, dict):
            raise ValueError(f"it holds {type(loaded).__name__}, not an object")
    except ValueError as e:
        raise OpticNerveError(f"{path} is damaged: {e}; {remedy}", kind="damaged") from e
    return loaded
