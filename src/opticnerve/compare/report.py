"""What the finished rows hold, as tables of seeds × questions, and the report that is written from it: report.md with
its plots, and results.csv with a line per system, seed and type."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opticnerve.common import atomic
from opticnerve.common.markdown import plain, table
from opticnerve.common.units import format_duration
from opticnerve.common.version import __version__
from opticnerve.compare.base import Base, Budget
from opticnerve.compare.rows import RowResult
from opticnerve.compare.stats import Array, Estimate, difference, over_seeds
from opticnerve.evaluation.metrics import summarise
from opticnerve.runs.folder import StageRecord, read_run
from opticnerve.types import OpticNerveError

ALL = "all"
"""The name of the group that holds every question."""
CSV_FACTS = (
    "train_seconds", "steps", "tokens", "trained", "visual_tokens", "between_parameters", "optimizer_bytes",
    "peak_training_bytes",
)  # fmt: skip


@dataclass
class System:
    """One way of answering: its scores, seed by seed, and what its training cost."""

    name: str
    title: str
    row: str
    scores: dict[int, list[float]] = field(default_factory=dict)
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def table_SQ(self) -> Array:
        """(seeds, questions)."""
        return np.array([self.scores[s] for s in sorted(self.scores)], dtype=float)

    def mean(self, fact: str) -> float | None:
        """A fact's mean over seeds; None where no seed has it."""
        known = [float(f[fact]) for f in self.facts.values() if f.get(fact) is not None]
        return sum(known) / len(known) if known else None


@dataclass
class Findings:
    """Everything a report is written from.

    `groups`: name → which questions (indices) belong to it; `ALL`, then the types of questions, then whatever the
    experiment adds. `curves`: row → seed → the records of its stages. `diverged`: row → seed → message.
    """

    base: Base
    budget: Budget
    systems: dict[str, System]
    groups: dict[str, list[int]]
    outcomes: list[RowResult]
    curves: dict[str, dict[int, list[StageRecord]]]
    diverged: dict[str, dict[int, str]]

    def __getitem__(self, name: str) -> System:
        return self.systems[name]

    def __contains__(self, name: str) -> bool:
        return name in self.systems

    def estimate(self, name: str, group: str = ALL) -> Estimate | None:
        return over_seeds(self[name].table_SQ[:, self.groups[group]])

    def versus(self, first: str, second: str, group: str = ALL) -> Estimate | None:
        """First minus second on the same questions; None where one of them has no result, or there are no questions."""
        if first not in self or second not in self:
            return None
        chosen = self.groups[group]
        return difference(self[first].table_SQ[:, chosen], self[second].table_SQ[:, chosen])

    @property
    def failures(self) -> list[RowResult]:
        return [o for o in self.outcomes if o.error is not None]

    @property
    def seeds(self) -> list[int]:
        return sorted({o.seed for o in self.outcomes})


def collect(base: Base, budget: Budget, outcomes: Sequence[RowResult]) -> Findings:
    """Read the answers of all finished rows, which were asked the same questions, or it is an error."""
    found = Findings(base, budget, {}, {}, list(outcomes), {}, {})
    asked: list[tuple[Any, Any]] = []
    for outcome in outcomes:
        record, row = outcome.record, outcome.row
        if record is None:
            continue
        if row.recipe is not None:
            found.curves.setdefault(row.name, {})[outcome.seed] = read_run(outcome.folder).stages
        if "diverged" in record:
            found.diverged.setdefault(row.name, {})[outcome.seed] = record["diverged"]
        for name, file in record["systems"].items():
            lines = read_answers(outcome.folder / file)
            mine = [(line["id"], line["question"]) for line in lines]
            if not asked:
                asked, found.groups = mine, groups_of([str(line.get("type") or ALL) for line in lines])
            if mine != asked:
                raise OpticNerveError(
                    f"{outcome.folder / file} answers other questions than the rows before it ({len(mine)} against "
                    f"{len(asked)}); remove its folder and run the row again",
                    kind="mismatch",
                )
            system = found.systems.setdefault(name, System(name, row.systems[name], row.name))
            system.scores[outcome.seed] = [float(line["right"]) for line in lines]
            system.facts[outcome.seed] = record["facts"]
    found.groups = found.groups or groups_of([])
    return found


def groups_of(kinds: Sequence[str]) -> dict[str, list[int]]:
    """All questions, then each type of them, the most frequent first."""
    groups = {ALL: list(range(len(kinds)))}
    for kind, _ in sorted(Counter(kinds).items(), key=lambda k: (-k[1], k[0])):
        if kind != ALL:
            groups[kind] = [i for i, k in enumerate(kinds) if k == kind]
    return groups


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The lines of an `answers/….jsonl`."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, json.JSONDecodeError) as e:
        raise OpticNerveError(
            f"{path} cannot be read: {e}; remove its row's folder and run the row again", kind="damaged"
        ) from e


# -- the report -------------------------------------------------------------------------------------------------------


@dataclass
class ExperimentReport:
    """What an experiment has to say. `sections`: heading and Markdown; plots stand in the report's folder already."""

    title: str
    compared: str
    budget: str
    sections: list[tuple[str, str]] = field(default_factory=list)
    shows: list[str] = field(default_factory=list)
    does_not: list[str] = field(default_factory=list)


def write(report: ExperimentReport, findings: Findings, folder: Path, *, command: str, experiment: str) -> Path:
    """Write report.md and results.csv; returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(findings, folder / "results.csv", experiment)
    shows = report.shows or ["Nothing: too few rows have finished."]
    failed = [f"`{o.row.name}`, seed {o.seed}: {plain(o.error)}" for o in findings.failures]
    sections = [
        *report.sections,
        ("What this shows", _bullets(shows)),
        ("What it does not show", _bullets([*report.does_not, *_limits(findings)])),
        *([("Rows that failed", _bullets(failed))] if failed else []),
        ("How it was made", _bullets(_made(findings, command))),
    ]
    parts = [f"# {report.title}", report.compared, f"**Budget.** {report.budget}"]
    path = folder / "report.md"
    text = "\n\n".join([*parts, *(f"## {heading}\n\n{text}" for heading, text in sections)])
    atomic.write(path, text + "\n")
    return path


def write_csv(findings: Findings, path: Path, experiment: str) -> None:
    """One line per system × seed × type of question."""

    def rounded(*values: Any) -> list[Any]:
        return [round(v, 6) if isinstance(v, float) else v for v in values]

    file = io.StringIO()
    out = csv.writer(file, lineterminator="\n")
    head = ("experiment", "row", "system", "seed", "questions", "n", "accuracy", "low", "high")
    out.writerow([*head, *CSV_FACTS])
    for system in findings.systems.values():
        for seed, scores in sorted(system.scores.items()):
            facts = rounded(*(system.facts[seed].get(k) for k in CSV_FACTS))
            for group, chosen in findings.groups.items():
                found = summarise([scores[i] for i in chosen])
                shown = rounded(found["accuracy"], *found["ci95"])
                out.writerow([experiment, system.row, system.name, seed, group, found["n"], *shown, *facts])
    atomic.write(path, file.getvalue())


Columns = Sequence[tuple[str, Callable[[System], str]]]
"""Headings, each with what stands under it for a system."""


def accuracy_table(
    findings: Findings, names: Sequence[str], *, more: Columns = (), first: Sequence[list[str]] = ()
) -> str:
    """Rows of systems; columns: every group of questions, then `more`. `first`: whole rows above them (baselines)."""

    def share(group: str) -> Callable[[System], str]:
        return lambda system: percent(findings.estimate(system.name, group))

    shares = [(f"{g} ({len(q):,})", share(g)) for g, q in findings.groups.items()]
    return systems_table(findings, names, [*shares, *more], first=first)


def systems_table(
    findings: Findings, names: Sequence[str], columns: Columns, *, first: Sequence[list[str]] = ()
) -> str:
    rows = [[findings[n].title, *(cell(findings[n]) for _, cell in columns)] for n in names if n in findings]
    rows = [r + [""] * (1 + len(columns) - len(r)) for r in [*first, *rows]]
    return table(["", *(h for h, _ in columns)], rows, right=tuple(range(1, 1 + len(columns))))


def percent(estimate: Estimate | None) -> str:
    """`84.2 % (80–88)`."""
    if estimate is None:
        return "–"
    return f"{100 * estimate.mean:.1f} % ({100 * estimate.low:.0f}–{100 * estimate.high:.0f})"


def points(estimate: Estimate) -> str:
    """`+4.1 points (+1.0 to +7.2)`."""
    return f"{100 * estimate.mean:+.1f} points ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def conclusion(first: str, second: str, gap: Estimate | None, where: str = "") -> str:
    """One sentence on a difference, that claims no more than its interval does."""
    if gap is None:
        return f"{first} and {second} cannot be compared{where}: one of them has no result there."
    if gap.low == gap.mean == gap.high == 0:
        return f"{first} and {second} are right on the same questions{where}."
    words = {1: "ahead of", -1: "behind", 0: "not told apart from"}[gap.sure]
    return f"{first} is {words} {second}{where}: {points(gap)}."


def align_words(budget: Budget) -> str:
    """How long the two stages of a docked model are."""
    align, instruct = budget["align"], budget["instruct"]
    return (
        f"{align['steps']} steps of {align['batch']} captions, then {instruct['steps']} steps of {instruct['batch']} "
        "rows of questions"
    )


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def size(count: float | None) -> str:
    """Bytes for people."""
    if count is None:
        return "–"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _limits(findings: Findings) -> list[str]:
    seeds = len(findings.seeds)
    between = (
        "one seed: the intervals are over questions alone, and say nothing of what another seed would give"
        if seeds == 1
        else f"{seeds} seeds: the intervals resample seeds and questions, but so few seeds underestimate what they vary"
    )
    return [
        f"{len(findings.groups[ALL]):,} test questions and {between}.",
        "One set of learning rates for each row, not tuned; another budget, other data or parts may turn the order.",
    ]


def _made(findings: Findings, command: str) -> list[str]:
    outcomes = findings.outcomes
    records = [o.record for o in outcomes if o.record is not None]
    m = records[0]["facts"]["machine"] if records else {}
    kept = sum(o.kept for o in outcomes)
    return [
        f"command: `{command}`",
        f"date: {datetime.now(UTC).date().isoformat()}",
        f"machine: {m.get('cpu', '?')}, {m.get('cores', '?')} cores, {size(m.get('memory_bytes'))}, "
        f"{m.get('device', '?')}; torch used {torch.get_num_threads()} thread(s)",
        f"versions: opticnerve {__version__}, Python {m.get('python', '?')}, torch {m.get('torch', '?')}, "
        f"transformers {m.get('transformers', '?')}",
        f"seeds: {', '.join(map(str, findings.seeds))}",
        f"all rows together: {format_duration(sum(r['wall_seconds'] for r in records))}"
        + (f" ({kept} of {len(outcomes)} kept from an earlier call)" if kept else ""),
        "numbers: [results.csv](results.csv), a line per system, seed and type of question; 95 % intervals there are "
        "Wilson's",
    ]


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
