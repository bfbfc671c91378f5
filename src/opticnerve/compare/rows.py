"""Rows of an experiment: which there are, which are finished, and how the others are run, one after the other."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from opticnerve.common import atomic
from opticnerve.common.units import format_duration
from opticnerve.common.version import __version__
from opticnerve.compare.base import Raw
from opticnerve.types import OpticNerveError

SPEC, OUTCOME, RECORD, LOG = "spec.json", "outcome.json", "row.json", "log.txt"
_write = partial(atomic.write_json, default=str)


@dataclass(frozen=True)
class ExperimentRow:
    """One line of an experiment.

    Args:
        name: also its folder's. systems: what it answers the questions as, name → title. recipe: what is trained, None
            where nothing is. asks: further ways to ask, `{"ask": …}` as in `compare.perform`. needs: rows of the same
            seed whose models it asks. keep_weights: such a model is this row's. of: the recipes of those rows, for its
            result is as old as theirs.
    """

    name: str
    systems: dict[str, str]
    recipe: Raw | None = None
    asks: tuple[Raw, ...] = ()
    needs: tuple[str, ...] = ()
    keep_weights: bool = False
    of: tuple[Raw, ...] = ()


@dataclass
class RowResult:
    """A row with one seed: its record if it is finished, what went wrong if it is not."""

    row: ExperimentRow
    seed: int
    folder: Path
    record: dict[str, Any] | None = None
    error: str | None = None
    kept: bool = False


@dataclass(frozen=True)
class RunOptions:
    """How rows are run.

    Args:
        isolated: each in a process of its own, so that its peak of memory is its own. memory_steps: the peak of
            training alone is measured, with the first seed, by so many steps of each stage in a further process; 0: not
            at all. keep_models: leave the weights of finished rows on disk.
    """

    isolated: bool = False
    memory_steps: int = 0
    keep_models: bool = False
    console: Console | None = field(default=None, compare=False)


class RowFailed(Exception):
    """A row's process came to an end without a result; the message is its last words."""


def identity(row: ExperimentRow, seed: int) -> str:
    """What a result belongs to: another recipe, way of asking or version of opticnerve makes it void."""
    parts: dict[str, Any] = {
        "recipe": with_seed(row, seed), "asks": row.asks, "systems": list(row.systems), "needs": row.needs,
    }  # fmt: skip
    if row.of:
        parts["of"] = [recipe | {"seed": seed} for recipe in row.of]
    return hashlib.sha256(json.dumps([__version__, parts], sort_keys=True).encode()).hexdigest()[:16]


def with_seed(row: ExperimentRow, seed: int) -> Raw | None:
    return None if row.recipe is None else row.recipe | {"seed": seed}


def folder_of(out: Path, row: ExperimentRow, seed: int) -> Path:
    return out / "rows" / row.name / f"seed-{seed}"


def finished(out: Path, row: ExperimentRow, seed: int) -> dict[str, Any] | None:
    """The record of a finished row, if it belongs to this very row."""
    path = folder_of(out, row, seed) / RECORD
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record if record.get("identity") == identity(row, seed) else None


def run_rows(rows: Sequence[ExperimentRow], seeds: Sequence[int], out: Path, options: RunOptions) -> list[RowResult]:
    """Run what is not finished, all rows of a seed before the next seed; what fails is noted, and the next one runs.
    Stopped by Ctrl-C, finished rows are kept, and a begun one has been saved."""
    results: dict[tuple[str, int], RowResult] = {}
    wanted = [(row, seed) for seed in seeds for row in rows]
    seconds: dict[str, list[float]] = {}
    for number, (row, seed) in enumerate(wanted, 1):
        result = results[row.name, seed] = RowResult(row, seed, folder_of(out, row, seed), finished(out, row, seed))
        result.kept = result.record is not None
        needs = [results.get((n, seed)) for n in row.needs]
        missing = [n for n, r in zip(row.needs, needs, strict=True) if r is None or r.record is None]
        if result.record is None and missing:
            result.error = f"needs {', '.join(missing)}, which did not finish"
        elif result.record is None:
            memory_steps = options.memory_steps if seed == seeds[0] else 0
            _run_one(result, [r.folder for r in needs if r is not None], options, memory_steps)
        if result.record is not None:
            seconds.setdefault(row.name, []).append(result.record["wall_seconds"])
        if options.console is not None:
            later = [r for r, s in wanted[number:] if finished(out, r, s) is None]
            line = _line(result, number, len(wanted), time_left(later, seconds))
            options.console.print(line, highlight=False, soft_wrap=True)
    if not options.keep_models:
        for result in results.values():
            if result.record is not None and not result.row.keep_weights:
                for file in result.folder.rglob("*.safetensors"):
                    file.unlink()
    return list(results.values())


def time_left(later: Sequence[ExperimentRow], seconds: dict[str, list[float]]) -> float | None:
    """From what the same rows took with other seeds, else from the mean of all that is known."""
    known = [s for each in seconds.values() for s in each]
    if not later or not known:
        return None
    usual = sum(known) / len(known)
    return sum(sum(s) / len(s) if (s := seconds.get(row.name)) else usual for row in later)


def _run_one(result: RowResult, needs: list[Path], options: RunOptions, memory_steps: int) -> None:
    row, seed, folder = result.row, result.seed, result.folder
    mine = identity(row, seed)
    _claim_folder(folder, mine, options.console)
    spec = {
        "recipe": with_seed(row, seed), "folder": str(folder), "asks": list(row.asks), "systems": list(row.systems),
        "needs": [str(n) for n in needs],
    }  # fmt: skip
    _write(folder / SPEC, {"identity": mine, **spec})
    begun = time.perf_counter()
    try:
        with nullcontext() if options.console is None else options.console.status(f"{row.name}, seed {seed} …"):
            found = in_process(spec) if options.isolated else _here(spec)
        took = time.perf_counter() - begun
        if memory_steps and spec["recipe"] is not None:
            found["facts"]["peak_training_bytes"] = _peak_of_training(spec, memory_steps)
    except Exception as e:  # whatever it is, the other rows are worth their time
        result.error = str(e) if isinstance(e, OpticNerveError | RowFailed) else f"{type(e).__name__}: {e}"
        atomic.write(folder / "error.txt", traceback.format_exc())
        return
    (folder / "error.txt").unlink(missing_ok=True)
    result.record = {
        "identity": mine, "row": row.name, "seed": seed, "opticnerve": __version__,
        "wall_seconds": round(took, 3), **found,
    }  # fmt: skip
    _write(folder / RECORD, result.record)


def _claim_folder(folder: Path, mine: str, console: Console | None) -> None:
    """A run of another recipe is set aside, not deleted: it may have taken hours."""
    spec = folder / SPEC
    if spec.is_file() and json.loads(spec.read_text(encoding="utf-8")).get("identity") != mine:
        aside = next(p for i in range(1, 10_000) if not (p := folder.with_name(f"{folder.name}.old-{i}")).exists())
        folder.rename(aside)
        if console is not None:
            console.print(f"{folder} was run by another recipe; it is set aside as {aside.name}", style="dim")
    folder.mkdir(parents=True, exist_ok=True)


def _here(spec: dict[str, Any]) -> dict[str, Any]:
    from opticnerve.compare.perform import perform

    return perform(spec)


def in_process(spec: dict[str, Any]) -> dict[str, Any]:
    """Run a row in a process of its own; what it prints stands in its folder's log.txt.

    Raises:
        RowFailed: what the row raised, or that it died without a word.
        KeyboardInterrupt: this process or that one was stopped; the row has been saved.
    """
    folder = Path(spec["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    job, outcome = folder / "worker.json", folder / OUTCOME
    _write(job, spec | {"outcome": str(outcome), "parent": os.getpid()})
    outcome.unlink(missing_ok=True)
    with (folder / LOG).open("ab") as log:
        # A session of its own: Ctrl-C in the terminal reaches this process alone, which passes on exactly one.
        child = subprocess.Popen(
            [sys.executable, "-m", "opticnerve.compare.perform", str(job)], stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            try:
                child.wait()
            except KeyboardInterrupt:
                child.kill()
            raise
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if not outcome.is_file():
        last = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise RowFailed(
            f"its process ended with code {code}; {folder / LOG} ends with: {' '.join(last) or '(nothing)'}"
        )
    found: dict[str, Any] = json.loads(outcome.read_text(encoding="utf-8"))
    outcome.unlink()
    job.unlink()
    if "error" in found:
        raise RowFailed(found["error"])
    return found


def _peak_of_training(spec: dict[str, Any], steps: int) -> int | None:
    """Peak memory of a process that does nothing but take some steps of each stage; None if it diverged."""
    folder = Path(spec["folder"]) / "memory"
    shutil.rmtree(folder, ignore_errors=True)
    stages = [s | {"steps": steps, "epochs": None, "save_every": None} for s in spec["recipe"]["stages"]]
    recipe = spec["recipe"] | {"stages": stages, "evaluate": [], "forgetting": False}
    try:
        found = in_process({"recipe": recipe, "folder": str(folder), "asks": [], "systems": [], "needs": []})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return None if "diverged" in found else int(found["facts"]["peak_memory_bytes"])


def _line(result: RowResult, number: int, count: int, left: float | None) -> str:
    head = f"{number:>3}/{count}  {result.row.name:<28} seed {result.seed}  "
    if result.record is None:
        return f"{head}[red]failed[/]: {escape(str(result.error))}"
    accuracy = result.record["facts"].get("accuracy", {})
    shown = [f"{accuracy[s]:.1%}" for s in result.row.systems if s in accuracy]
    took = "kept" if result.kept else format_duration(result.record["wall_seconds"])
    wait = "" if left is None else f"; about {format_duration(left)} left"
    return f"{head}{', '.join(shown) or result.record.get('diverged', '')}  ({took}{wait})"
