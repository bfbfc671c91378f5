"""Start a training from the page, watch it, stop it, go on with it: each the command that one would type.

A training is a process of its own in a session of its own, so that it outlives the page and the server. It writes its
run folder as any training does; what it prints goes to a file (see `runs`). Only recipes that ship with opticnerve or
lie below the folder of runs are trained, and only a few of their keys can be changed from here: a recipe can name any
file and any Python class, and who reaches the page need not be the one who wrote it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from opticnerve import recipe as recipes
from opticnerve.starter.demo import packaged, recipe_path
from opticnerve.types import OpticNerveError
from opticnerve.ui import runs
from opticnerve.ui.runs import (
    ShownStage,
    TrainingJob,
    is_run,
    lives,
    log_of,
    open_run,
    read_job,
    run_folder,
    trained_by,
    walk_folders,
    write_job,
)

READY, FILE = "ready:", "file:"
MOST_RECIPES = 200
LOG_LINES, LOG_BYTES = 14, 32_768
NAME = re.compile(r"\w[\w.-]{0,79}")
MAY_CHANGE = re.compile(
    r"(seed|precision|forgetting|forgetting_tokens"
    r"|stages\.\d+\.(steps|epochs|batch_size|accumulate|save_every|warmup|clip|workers)"
    r"|stages\.\d+\.train\.[\w.]+|stages\.\d+\.lora\.(rank|alpha|dropout)"
    r"|evaluate\.\d+\.(sample|image_dependence|batch_size|max_new_tokens))=[\w.+-]+"
)
_AT_STEP = re.compile(r"^(.+): step (\d+)/(\d+) ")
_NO_TEXT = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")

Doing = Literal["idle", "running", "stopping", "finished", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class Watched:
    """What is to be seen of the newest training.

    Args:
        stage: the newest one that has begun, with its lines; `number` of `count`, from 1.
        total: its steps, as far as they are known.
    """

    doing: Doing
    job: TrainingJob | None = None
    stage: ShownStage | None = None
    number: int = 0
    count: int = 0
    total: int | None = None
    log: list[str] = field(default_factory=list)


def list_recipes(root: Path) -> list[str]:
    """`ready:NAME` for those that ship with opticnerve, those of the starter first, and `file:PLACE` for those below
    the folder of runs."""
    ready = sorted(packaged(), key=lambda name: not name.startswith("starter"))
    own = [
        (folder / name).relative_to(root).as_posix()
        for folder, is_one, names in walk_folders(root)
        for name in names
        if not is_one and name.endswith((".yaml", ".yml"))
    ]
    return [READY + name for name in ready] + [FILE + name for name in sorted(own)[:MOST_RECIPES]]


def recipe_file(root: Path, choice: str) -> Path:
    """The file of a recipe that a browser has named. Raises OpticNerveError: it is none of `list_recipes`."""
    if choice not in list_recipes(root):
        raise OpticNerveError(
            f"there is no recipe {choice!r}: choose a ready one, or one that lies in {root}", kind="missing-file"
        )
    if choice.startswith(READY):
        return recipe_path(choice.removeprefix(READY))
    path = root / choice.removeprefix(FILE)
    if not path.resolve().is_relative_to(root.resolve()) or not path.is_file():
        raise OpticNerveError(f"{path} is a link to elsewhere; copy the recipe into {root}", kind="no-permission")
    return path


def free_name(root: Path, choice: str) -> str:
    """A name for a new run of a recipe: `starter`, `starter-2`, …"""
    stem = re.sub(r"[^\w.-]+", "-", Path(choice.partition(":")[2]).name.removesuffix(".yaml").removesuffix(".yml"))
    stem = stem.strip("-.") or "run"
    number = 1
    while (root / (name := stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return name


def changes_of(text: str) -> list[str]:
    """`stages.0.steps=50 seed=1` as a list. Raises OpticNerveError: one of them is none, or changes what cannot be
    changed from the page."""
    words = text.split()
    for word in words:
        if not MAY_CHANGE.fullmatch(word):
            raise OpticNerveError(
                f"{word!r} cannot be changed here; what can: seed, precision, forgetting, and of a stage its steps, "
                f"epochs, batch_size, accumulate, save_every, warmup, clip, workers, train.PART and lora, of an "
                f"evaluation its sample and image_dependence. For all else write a recipe of your own",
                kind="unknown-key",
            )
    return words


def start(root: Path, choice: str, name: str, changes: str = "") -> TrainingJob:
    """Begin a run of a recipe in a new folder. Raises OpticNerveError: another training runs; the recipe, the name or a
    change is not one that can be."""
    file, more = recipe_file(root, choice), changes_of(changes)
    recipe = recipes.load(file, more)
    if not recipe.stages:
        raise OpticNerveError(f"{file.name} has no stages, so there is nothing to train", kind="empty")
    if not NAME.fullmatch(name):
        raise OpticNerveError(
            f"{name!r} is no name for a run: letters, digits, '-', '_' and '.', 80 at most", kind="wrong-type"
        )
    folder = root / name
    if folder.is_symlink() or folder.exists():
        raise OpticNerveError(
            f"{name} is there already; choose another name, or go on with that run", kind="exists-already"
        )
    shown = choice.removeprefix(READY) if choice.startswith(READY) else _typed(file)
    if Path(shown).exists() and choice.startswith(READY):  # the command would take what lies here for the recipe
        shown = str(file)
    return _launch(root, name, [shown, *more, "--out", _typed(folder)])


def resume(root: Path, name: str) -> TrainingJob:
    """Go on with a run that was stopped. Raises OpticNerveError: there is no such run, it is finished or runs already
    (in a terminal, perhaps), or another training does."""
    folder = run_folder(root, name)
    if (state := open_run(root, name).state) != "stopped":
        raise OpticNerveError(f"{name} is {state}; there is nothing to go on with", kind="refused")
    if (other := trained_by(folder)) is not None:  # two that write one folder would ruin it
        raise OpticNerveError(f"process {other} seems to train in {folder.parent}; let it end first", kind="conflict")
    return _launch(root, name, ["--resume", _typed(folder)])


def stop(root: Path) -> TrainingJob:
    """Ask the training to finish its step, save and leave; a second time does nothing.

    SIGTERM, for which the command listens from its first moments: Ctrl-C's SIGINT is ignored by whatever was started
    in the background of a shell. It goes to the process alone, not to those that load its data.

    Raises:
        OpticNerveError: no training runs.
    """
    import psutil

    with _lock(root):
        job = read_job(root)
        if job is None or not lives(job):
            raise OpticNerveError("no training runs", kind="empty")
        if job.asked is None:  # a second signal would end it before it has saved
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(job.pid).terminate()
            job = replace(job, asked=time.time())
            write_job(root, job)
        return job


def watch(root: Path) -> Watched:
    """What the newest training does, from its run folder and what it has printed. Raises OpticNerveError: the file that
    tells of it is damaged."""
    job = read_job(root)
    if job is None:
        return Watched("idle")
    log = tail(log_of(root, job.run))
    stages: list[ShownStage] = []
    results: dict[str, Any] = {}
    if is_run(root / job.run):
        run = open_run(root, job.run)
        stages, results = run.stages, run.results
    begun = [i for i, s in enumerate(stages) if s.metrics]
    stage = stages[begun[-1]] if begun else None
    total = stage.planned if stage is not None else None
    for line in log:
        if stage is not None and (at_step := _AT_STEP.match(line)) and at_step[1] == stage.name:
            total = int(at_step[3])
    number = begun[-1] + 1 if begun else 0
    return Watched(_doing(job, results, log), job, stage, number, len(stages), total, log[-LOG_LINES:])


def tail(path: Path) -> list[str]:
    """The last lines of what was printed, without the codes of terminals."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            text = file.read(LOG_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = [_NO_TEXT.sub("", line).rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return [line for line in lines if line]


def _doing(job: TrainingJob, results: dict[str, Any], log: list[str]) -> Doing:
    if lives(job):
        return "running" if job.asked is None else "stopping"
    if "tasks" in results:
        return "finished"
    # Where the server that started it has gone, nobody knows its exit code; the command says "error: …" for its part.
    failed = job.code not in (0, 130) if job.code is not None else any(line.startswith("error:") for line in log)
    return "failed" if failed and job.asked is None else "stopped"


def _launch(root: Path, name: str, words: list[str]) -> TrainingJob:
    import psutil

    if os.name != "posix":
        raise OpticNerveError(
            "the page starts trainings on Linux and macOS alone; use `opticnerve train`", kind="unsupported"
        )
    with _lock(root):
        if lives(before := read_job(root)):
            assert before is not None
            raise OpticNerveError(
                f"{before.run} is being trained; stop it first, or wait until it ends", kind="conflict"
            )
        log = log_of(root, name)
        with log.open("wb") as printed:
            process = subprocess.Popen(
                [sys.executable, "-m", runs.PROGRAM, "train", *words],
                stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True,
                env=_environment(),
            )  # fmt: skip
        created = psutil.Process(process.pid).create_time()
        job = TrainingJob(name, process.pid, created, shlex.join(["opticnerve", "train", *words]), time.time())
        write_job(root, job)
    threading.Thread(target=_await, args=(root, process), name=f"training-{process.pid}", daemon=True).start()
    return job


def _environment() -> dict[str, str]:
    """The server's own, without its password; plain lines that are not broken."""
    kept = {k: v for k, v in os.environ.items() if k != "OPTICNERVE_UI_LOGIN"}
    return {**kept, "COLUMNS": "200", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}


def _await(root: Path, process: subprocess.Popen[bytes]) -> None:
    """Its exit code, noted when it ends; without this its process would stay as a zombie."""
    code = process.wait()
    with contextlib.suppress(OSError, OpticNerveError), _lock(root):  # the folder may be gone with it
        runs.ended(root, process.pid, code)


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
    """One at a time, among all servers on this folder; the system lets go of it when a server dies."""
    import fcntl

    folder = root / runs.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _typed(path: Path) -> str:
    """A path as one would type it here; one that begins like an option is written out."""
    full, here = path.resolve(), Path.cwd().resolve()
    short = full.relative_to(here).as_posix() if full.is_relative_to(here) else str(full)
    return str(full) if short.startswith("-") else short
