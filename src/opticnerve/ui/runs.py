"""What lies in the folder of runs, read for people: the runs, and the training that the page has started.

A run may have been copied from anywhere, so nothing in it is believed: no file outside of it is read, whatever its
names and links say, and none that is too large. What cannot be read is left out, and the reason is told in `notes`.
What is known of a training lies in a file, too, not in memory: a page that is loaded again, or another server on the
same folder, finds the same training.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from opticnerve import recipe as recipes
from opticnerve.common import atomic
from opticnerve.runs.folder import read_metrics
from opticnerve.types import OpticNerveError, RecipeError

FOLDER = ".opticnerve-ui"
"""Below the folder of runs: the file of the training, a lock, and what each training has printed."""

PROGRAM = "opticnerve_launch"
"""The module that is run; a process whose command line lacks it is none of ours, whatever its number."""


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A training as a process.

    Args:
        run: the run's folder, below the folder of runs.
        pid, created: the process, and when it was made (seconds since the epoch): numbers of processes are given again.
        command: as one would type it.
        asked: when it was asked to stop. code: how it ended, if the server that started it saw that.
    """

    run: str
    pid: int
    created: float
    command: str
    started: float
    asked: float | None = None
    code: int | None = None


def read_job(root: Path) -> TrainingJob | None:
    """The newest training started below `root`; None if there was none. Raises OpticNerveError: the file that tells of
    it is damaged."""
    path = _file(root)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return TrainingJob(
            **{**record, "run": str(record["run"]), "pid": int(record["pid"]), "created": float(record["created"])}
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        raise OpticNerveError(
            f"{path} is damaged ({e}); see that no training runs, and delete it", kind="damaged"
        ) from e


def write_job(root: Path, job: TrainingJob) -> None:
    _file(root).parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(_file(root), asdict(job))


def lives(job: TrainingJob | None) -> bool:
    """Whether the process is there, is the same one, and has not ended."""
    import psutil

    if job is None or job.code is not None:
        return False
    try:
        process = psutil.Process(job.pid)
        same = abs(process.create_time() - job.created) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE and PROGRAM in process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError, OverflowError):
        return False


def trained_by(folder: Path) -> int | None:
    """The number of a process that, by its command line, trains in this folder, or in some folder beside it."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError, ValueError):
            words = process.cmdline()
            command = next((i for i, w in enumerate(words) if w in ("train", "demo")), 0)
            if not command or not any("opticnerve" in w for w in words[:command]):
                continue
            here, given = Path(process.cwd()), words[command + 1 :]
            named = [w.removeprefix("--out=") for w in given]
            unnamed = not any(w == "--resume" or w.startswith("--out") for w in given)
            if unnamed and folder.parent.resolve() == (here / "runs").resolve():
                return int(process.pid)
            if any((here / w).resolve() == folder.resolve() for w in named):
                return int(process.pid)
    return None


def ended(root: Path, pid: int, code: int) -> None:
    """Note how a training ended, unless another one has begun since."""
    job = read_job(root)
    if job is not None and job.pid == pid and job.code is None:
        write_job(root, replace(job, code=code))


def log_of(root: Path, run: str) -> Path:
    """Where a run's training prints to."""
    return root / FOLDER / f"{run.replace('/', '--')}.log"


def _file(root: Path) -> Path:
    return root / FOLDER / "training.json"


# -- the runs -------------------------------------------------------------------------------------------------------

State = Literal["finished", "running", "stopped"]
MEGABYTE = 10**6
DEPTH, MOST_FOLDERS = 3, 5000
RECENT = 30.0
"""Seconds: an unfinished run that nobody here has started, and that wrote something since, is taken to be running."""


@dataclass(frozen=True, slots=True)
class ShownStage:
    """A stage of a run: how many steps are done, how many are planned (None where the data decide), its lines."""

    name: str
    folder: Path
    finished: bool
    planned: int | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0


@dataclass(frozen=True, slots=True)
class ShownRun:
    """A run as it lies on disk. `name`: its folder below the folder of runs. `written`: seconds since the epoch."""

    name: str
    path: Path
    state: State
    written: float
    results: dict[str, Any]
    stages: list[ShownStage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> list[dict[str, Any]]:
        return dicts(self.results.get("tasks"))


def list_runs(root: Path) -> list[ShownRun]:
    """All runs below `root`, the newest first, without the lines of their stages."""
    job = _job(root)
    found = [_read(root, folder, job, lines=False) for folder, is_one, _ in walk_folders(root) if is_one]
    return sorted(found, key=lambda run: (-run.written, run.name))


def open_run(root: Path, name: str) -> ShownRun:
    """The run in a folder below `root`, with the lines of its stages. Raises OpticNerveError: it is no run's folder, or
    lies elsewhere."""
    return _read(root, run_folder(root, name), _job(root), lines=True)


def run_folder(root: Path, name: str) -> Path:
    """The folder of a run that a browser has named. Raises OpticNerveError: it is no run's folder, or lies
    elsewhere."""
    folder = root / name
    try:
        if not _within(root, folder) or not is_run(folder):
            raise OpticNerveError(f"there is no run {name!r} in {root}", kind="missing-file")
    except (OSError, ValueError) as e:  # a name with a zero byte, or too long
        raise OpticNerveError(f"there is no run {name!r} in {root}: {e}", kind="missing-file") from e
    return folder


def is_run(folder: Path) -> bool:
    """Whether training has begun in a folder: there is a recipe, and something that training writes."""
    return (folder / "recipe.yaml").is_file() and ((folder / "stages").is_dir() or (folder / "results.json").is_file())


def read_file(folder: Path, name: str | Path, most: int) -> bytes:
    """A file of a run: a regular one, below its folder when all links are followed, of at most `most` bytes.

    Raises:
        OpticNerveError: it is none of that. FileNotFoundError: there is none.
    """
    path = folder / name
    if not _within(folder, path):
        raise OpticNerveError(f"{name} lies outside of the run's folder and is not read", kind="no-permission")
    if not path.exists():
        raise FileNotFoundError(f"there is no {name}")
    if not path.is_file():
        raise OpticNerveError(f"{name} is no file", kind="wrong-type")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OpticNerveError(f"{name} is larger than the {most / MEGABYTE:g} MB that are read here", kind="too-large")
    return data


def dicts(value: object) -> list[dict[str, Any]]:
    """The mappings in what should be a list of them."""
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def walk_folders(root: Path) -> Iterator[tuple[Path, bool, list[str]]]:
    """(folder, whether it is a run's, its files), at most `DEPTH` below `root`; runs hold no runs, and links and hidden
    folders are not entered."""
    for here, inner, names in itertools.islice(os.walk(root), MOST_FOLDERS):
        folder = Path(here)
        run, deep = is_run(folder), len(folder.relative_to(root).parts) >= DEPTH
        inner[:] = [] if run or deep else sorted(name for name in inner if not name.startswith("."))
        yield folder, run, names


def _read(root: Path, folder: Path, job: TrainingJob | None, *, lines: bool) -> ShownRun:
    notes: list[str] = []
    name = folder.relative_to(root).as_posix()
    results = _json(folder, "results.json", notes)
    stages = _stages(folder, notes, lines=lines)
    written = _written(folder, stages)
    state: State = "stopped"
    if job is not None and job.run == name and lives(job):
        state = "running"
    elif "tasks" in results:  # written once, when all is trained and evaluated
        state = "finished"
    elif time.time() - written < RECENT and (job is None or job.run != name):
        state = "running"
    return ShownRun(name, folder, state, written, results, stages, notes)


def _stages(folder: Path, notes: list[str], *, lines: bool) -> list[ShownStage]:
    """The recipe's stages; where the recipe cannot be read, those that have a folder."""
    planned: dict[str, int | None] = {}
    try:
        read_file(folder, "recipe.yaml", MEGABYTE)
        for number, stage in enumerate(recipes.load(folder / "recipe.yaml").stages):
            planned[f"{number}-{stage.name}"] = stage.steps
    except (OSError, RecipeError, OpticNerveError) as e:
        notes.append(f"recipe.yaml: {e}")
        begun = [f.name for f in (folder / "stages").glob("*-*") if f.is_dir() and f.name.split("-")[0].isdigit()]
        planned = dict.fromkeys(sorted(begun, key=lambda n: int(n.split("-")[0])))
    return [_stage(folder, place, steps, notes, lines=lines) for place, steps in planned.items()]


def _stage(folder: Path, place: str, planned: int | None, notes: list[str], *, lines: bool) -> ShownStage:
    here = folder / "stages" / place
    result = _json(folder, f"stages/{place}/result.json", notes)
    metrics: list[dict[str, Any]] = []
    if lines:
        try:
            read_file(folder, f"stages/{place}/metrics.jsonl", 64 * MEGABYTE)
            metrics = read_metrics(here / "metrics.jsonl")
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError) as e:
            notes.append(f"stages/{place}/metrics.jsonl: {e}")
    steps = result.get("steps", planned)
    return ShownStage(place.partition("-")[2], here, bool(result), steps if isinstance(steps, int) else None, metrics)


def _json(folder: Path, name: str, notes: list[str]) -> dict[str, Any]:
    try:
        loaded = json.loads(read_file(folder, name, 32 * MEGABYTE))
        if not isinstance(loaded, dict):
            raise ValueError(f"it holds {type(loaded).__name__}, not an object")
    except FileNotFoundError:
        return {}  # not written yet
    except (OSError, ValueError, RecursionError) as e:
        notes.append(f"{name} cannot be read: {e}")
        return {}
    return loaded


def _written(folder: Path, stages: list[ShownStage]) -> float:
    files = [folder / "recipe.yaml", folder / "results.json", *(s.folder / "metrics.jsonl" for s in stages)]
    return max((f.stat().st_mtime for f in files if f.is_file()), default=0.0)


def _within(folder: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _job(root: Path) -> TrainingJob | None:
    try:
        return read_job(root)
    except OpticNerveError:  # the tab for training tells it; what others have trained can be read all the same
        return None
