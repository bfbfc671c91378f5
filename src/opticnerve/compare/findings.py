"""What the finished rows of an experiment hold, brought into tables: seeds × questions for every system."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from opticnerve.compare.base import Base
from opticnerve.compare.rows import RowResult
from opticnerve.compare.stats import Array, Estimate, difference, over_seeds
from opticnerve.runs.folder import StageRecord, read_run
from opticnerve.types import OpticNerveError

ALL = "all"
"""The name of the group that holds every question."""


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
    budget: dict[str, Any]
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
        return over_seeds(self.systems[name].table_SQ[:, self.groups[group]])

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

    @cached_property
    def machine(self) -> dict[str, Any]:
        """Where the rows ran."""
        return next((o.record["facts"]["machine"] for o in self.outcomes if o.record is not None), {})

    @property
    def wall_seconds(self) -> float:
        return sum(o.record["wall_seconds"] for o in self.outcomes if o.record is not None)


def collect(base: Base, budget: dict[str, Any], outcomes: Sequence[RowResult]) -> Findings:
    """Read the answers of all finished rows.

    Raises:
        OpticNerveError: two rows were asked different questions.
    """
    systems: dict[str, System] = {}
    curves: dict[str, dict[int, list[StageRecord]]] = {}
    diverged: dict[str, dict[int, str]] = {}
    asked: list[tuple[Any, Any]] = []
    kinds: list[str] = []
    for outcome in outcomes:
        record, row = outcome.record, outcome.row
        if record is None:
            continue
        if row.recipe is not None:
            curves.setdefault(row.name, {})[outcome.seed] = read_run(outcome.folder).stages
        if "diverged" in record:
            diverged.setdefault(row.name, {})[outcome.seed] = record["diverged"]
        for name, file in record["systems"].items():
            lines = read_answers(outcome.folder / file)
            mine = [(line["id"], line["question"]) for line in lines]
            if not asked:
                asked, kinds = mine, [str(line.get("type") or ALL) for line in lines]
            if mine != asked:
                raise OpticNerveError(
                    f"{outcome.folder / file} answers other questions than the rows before it ({len(mine)} against "
                    f"{len(asked)}); remove its folder and run the row again"
                )
            system = systems.setdefault(name, System(name, row.systems[name], row.name))
            system.scores[outcome.seed] = [float(line["right"]) for line in lines]
            system.facts[outcome.seed] = record["facts"]
    return Findings(base, budget, systems, groups_of(kinds), list(outcomes), curves, diverged)


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
        raise OpticNerveError(f"{path} cannot be read: {e}; remove its row's folder and run the row again") from e
