"""An experiment from its base recipe to its report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from opticnerve.compare import report as reports
from opticnerve.compare.base import Base, Budget
from opticnerve.compare.rows import ExperimentRow, RowResult, RunOptions, finished, folder_of, run_rows
from opticnerve.types import OpticNerveError


@dataclass(frozen=True)
class Experiment:
    """What is compared.

    Args:
        budget: `seeds`, `questions`, and mappings with `steps` and `batch`; quick: the same, for a try. rows: what the
            budget makes of a base. report: what the findings say; it may draw into the folder. isolated: see `rows`.
    """

    name: str
    budget: Budget
    quick: Budget
    rows: Callable[[Base, Budget], list[ExperimentRow]]
    report: Callable[[reports.Findings, Path], reports.ExperimentReport]
    isolated: bool = False


@dataclass(frozen=True)
class ExperimentResult:
    """What an experiment left: its rows, and its report if there was anything to report."""

    outcomes: list[RowResult]
    report: Path | None

    @property
    def failures(self) -> list[RowResult]:
        return [o for o in self.outcomes if o.error is not None]


def run(
    experiment: Experiment, base: Base, out: Path, *, report: Path | None = None, seeds: int | None = None,
    scale: float = 1.0, only: Sequence[str] | None = None, quick: bool = False, keep_models: bool = False,
    command: str = "", console: Console | None = None,
) -> ExperimentResult:  # fmt: skip
    """Run the rows that are not finished, and write the report of all that are.

    Args:
        report: its folder, `out/report` by default. seeds: how many trainings of each row; the budget's by default.
        scale: on the number of steps of every stage. only: names of rows; those that they need come along.
        command: what the user typed, for the report.

    Raises:
        OpticNerveError: the base lacks something, or there is no such row. KeyboardInterrupt: stopped, and saved.
    """
    budget = stretched(experiment.quick if quick else experiment.budget, scale)
    many = seeds or budget["seeds"]
    rows = experiment.rows(base, budget)
    chosen = choose(rows, only)
    if console is not None:
        console.print(f"{len(chosen)} rows × {many} seed(s), in {out}", highlight=False)
    options = RunOptions(experiment.isolated, budget.get("memory_steps", 0), keep_models, console)
    ran = {(o.row.name, o.seed): o for o in run_rows(chosen, range(many), out, options)}
    outcomes = []
    for row, seed in ((row, seed) for seed in range(many) for row in rows):
        if (row.name, seed) in ran:
            outcomes.append(ran[row.name, seed])
        elif (record := finished(out, row, seed)) is not None:
            outcomes.append(RowResult(row, seed, folder_of(out, row, seed), record, kept=True))
    if not any(o.record for o in outcomes):
        return ExperimentResult(outcomes, None)
    findings, folder = reports.collect(base, budget, outcomes), report or out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    said = experiment.report(findings, folder)
    path = reports.write(said, findings, folder, command=command, experiment=experiment.name)
    return ExperimentResult(outcomes, path)


def quick(budget: Budget, **changes: int) -> Budget:
    """The same for a try: one seed, few questions, a step of each stage."""
    lengths = {k: {"steps": 1, "batch": min(4, v["batch"])} for k, v in budget.items() if isinstance(v, dict)}
    return budget | {"seeds": 1, "questions": 12} | lengths | changes


def stretched(budget: Budget, scale: float) -> Budget:
    """The budget with `scale` times the steps everywhere."""
    if scale <= 0:
        raise OpticNerveError(
            f"scale multiplies the number of steps; give a number above 0, not {scale:g}", kind="out-of-range"
        )

    def stretch(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: stretch(k, v) for k, v in value.items()}
        return max(1, round(value * scale)) if key == "steps" else value

    return {k: stretch(k, v) for k, v in budget.items()}


def choose(rows: Sequence[ExperimentRow], only: Sequence[str] | None) -> list[ExperimentRow]:
    """The rows of those names, and those that they need, in the experiment's order."""
    names = [r.name for r in rows]
    if unknown := sorted(set(only or ()) - set(names)):
        raise OpticNerveError(f"no such row: {', '.join(unknown)}; the rows: {', '.join(names)}", kind="unknown-name")
    wanted = set(only or names)
    wanted |= {n for r in rows if r.name in wanted for n in r.needs}
    return [r for r in rows if r.name in wanted]
