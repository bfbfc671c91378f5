"""A few runs of one recipe that differ in some of its settings, each a row as the experiments have them, and one
table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from opticnerve.common import atomic
from opticnerve.common.markdown import plain, slug, table
from opticnerve.common.units import format_duration
from opticnerve.compare.base import TASK
from opticnerve.compare.report import percent, read_answers
from opticnerve.compare.rows import ExperimentRow, RowResult, RunOptions, run_rows
from opticnerve.compare.stats import over_seeds
from opticnerve.recipe import Recipe
from opticnerve.types import OpticNerveError

_ASKED = ("vqa", "yes_no", "ocr")  # whose answers are kept one by one: an interval wants them


def settings(overrides: Sequence[str]) -> list[list[str]]:
    """`["a=1,2", "b=3"]` → `[["a=1", "b=3"], ["a=2", "b=3"]]`: every combination, in the order given.

    Raises:
        OpticNerveError: one is no `KEY=VALUE`, a value stands twice, or nothing varies.
    """
    axes = []
    for override in overrides:
        key, equals, values = override.partition("=")
        if not key or not equals:
            raise OpticNerveError(f"{override}: write KEY=VALUE, or KEY=VALUE,VALUE", kind="wrong-type")
        axes.append([f"{key}={value}" for value in _split(values)])
        if len(set(axes[-1])) < len(axes[-1]):
            raise OpticNerveError(f"{override}: a value stands there twice", kind="conflict")
    if all(len(axis) == 1 for axis in axes):
        raise OpticNerveError(
            "nothing varies: give a setting several values, such as stages.0.train.connector=1e-3,3e-3", kind="empty"
        )
    return [list(combination) for combination in itertools.product(*axes)]


def sweep_rows(read: Callable[[list[str]], Recipe], overrides: Sequence[str]) -> list[ExperimentRow]:
    """A row for each combination of settings; `read` makes a recipe of overrides. All are checked before one runs."""
    combinations = settings(overrides)
    varied = [k for k in range(len(overrides)) if len({c[k] for c in combinations}) > 1]
    rows = []
    for combination in combinations:
        title = ", ".join(combination[k] for k in varied)
        raw = read(combination).model_dump(mode="json") | {"forgetting": False}
        entry = next((e for e in raw["evaluate"] if e["metric"] in _ASKED), None)
        watches = [watched for stage in raw["stages"] if (watched := stage["validate"]) is not None]
        # What a stage goes by is asked as it is told to; answers are counted of the first entry.
        others = [e for e in raw["evaluate"] if e is not entry and e["name"] in {w["metric"] for w in watches}]
        asked = [] if entry is None else [entry | {"name": TASK, "image_dependence": 0}]
        raw["evaluate"] = asked + others
        for watched in watches:
            if entry is not None and watched["metric"] == entry["name"]:
                watched["metric"] = TASK
        rows.append(ExperimentRow(slug(title), {} if entry is None else {TASK: title}, raw))
    if len({row.name for row in rows}) < len(rows):
        raise OpticNerveError(f"two settings make the same folder: {', '.join(r.name for r in rows)}", kind="conflict")
    return rows


def run_sweep(
    read: Callable[[list[str]], Recipe], overrides: Sequence[str], out: Path, *, seeds: int = 1,
    keep_models: bool = False, command: str = "", console: Console | None = None,
) -> tuple[Path, list[RowResult]]:  # fmt: skip
    """Run what is not finished, and write `out/sweep.md`: its path, and all results.

    Raises:
        OpticNerveError: a setting does not exist, or contradicts another. KeyboardInterrupt: stopped, and saved.
    """
    rows = sweep_rows(read, overrides)
    results = run_rows(rows, range(seeds), out, RunOptions(keep_models=keep_models, console=console))
    titles = {row.name: ", ".join(c for c in combination if c in _varied(overrides)) for row, combination in
              zip(rows, settings(overrides), strict=True)}  # fmt: skip
    lines = [_line(titles[row.name], [r for r in results if r.row is row and r.record is not None]) for row in rows]
    head = ["setting", "held-out loss", "final loss", "accuracy (95 %)", "seeds", "steps", "time"]
    said = (
        f"`{command}`\n\nThe held-out loss is the best of the last stage's looks; losses are means, in brackets the "
        f"range over seeds. The interval of the accuracy is over questions and seeds."
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / "sweep.md"
    atomic.write(path, f"# Sweep\n\n{said}\n\n{table(head, lines, right=(1, 2, 3, 4, 5, 6))}\n")
    return path, results


def _varied(overrides: Sequence[str]) -> set[str]:
    parts = (override.partition("=") for override in overrides)
    return {f"{key}={v}" for key, _, values in parts for v in _split(values) if len(_split(values)) > 1}


def _split(values: str) -> list[str]:
    """At the commas that stand within no brackets and quotes."""
    found, depth, quote = [""], 0, ""
    for letter in values:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quote:
            found.append("")
        else:
            found[-1] += letter
    return found


def _line(title: str, finished: list[RowResult]) -> list[str]:
    facts: list[dict[str, Any]] = [r.record["facts"] for r in finished if r.record is not None]
    facts = [f for f in facts if "steps" in f]  # of a training that diverged, there are none
    held = [f["validation"]["best"] for f in facts if f["validation"] and f["validation"]["metric"] == "loss"]
    scores = [
        [float(line["right"]) for line in read_answers(r.folder / r.record["systems"][TASK])]
        for r in finished if r.record is not None and TASK in r.record["systems"]
    ]  # fmt: skip
    return [
        f"`{plain(title)}`", _range(held), _range([f["final_loss"] for f in facts]),
        percent(over_seeds(scores)) if scores else "–", str(len(facts)),
        f"{fmean(f['steps'] for f in facts):,.0f}" if facts else "–",
        format_duration(fmean(f["train_seconds"] for f in facts)) if facts else "–",
    ]  # fmt: skip


def _range(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    spread = f" ({min(known):.3f}–{max(known):.3f})" if len(known) > 1 else ""
    return f"{fmean(known):.3f}{spread}"
