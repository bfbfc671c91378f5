"""The report of an experiment: report.md with its plots, and results.csv with a line per system, seed and type."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from opticnerve.common.markdown import duration, plain, table
from opticnerve.common.version import __version__
from opticnerve.compare.findings import ALL, Findings
from opticnerve.compare.stats import Estimate
from opticnerve.evaluation.metrics import summarise


@dataclass
class Report:
    """What an experiment has to say. `sections`: heading and Markdown; `plots`: made in the report's folder already."""

    title: str
    compared: str
    budget: str
    sections: list[tuple[str, str]] = field(default_factory=list)
    shows: list[str] = field(default_factory=list)
    does_not: list[str] = field(default_factory=list)


def write(report: Report, findings: Findings, folder: Path, *, command: str, experiment: str) -> Path:
    """Write report.md and results.csv; returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(findings, folder / "results.csv", experiment)
    parts = [f"# {report.title}", report.compared, f"**Budget.** {report.budget}"]
    for heading, text in report.sections:
        parts.append(f"## {heading}\n\n{text}")
    parts.append("## What this shows\n\n" + _bullets(report.shows or ["Nothing: too few rows have finished."]))
    parts.append("## What it does not show\n\n" + _bullets([*report.does_not, *_limits(findings)]))
    if findings.failures:
        told = [f"`{o.row.name}`, seed {o.seed}: {plain(o.error)}" for o in findings.failures]
        parts.append("## Rows that failed\n\n" + _bullets(told))
    parts.append(f"## How it was made\n\n{_made(findings, command)}")
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def write_csv(findings: Findings, path: Path, experiment: str) -> None:
    """One line per system × seed × type of question."""
    names = ("train_seconds", "steps", "tokens", "trained", "visual_tokens", "between_parameters", "optimizer_bytes",
             "peak_training_bytes")  # fmt: skip
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["experiment", "row", "system", "seed", "questions", "n", "accuracy", "low", "high", *names])
        for system in findings.systems.values():
            for seed, scores in sorted(system.scores.items()):
                for group, chosen in findings.groups.items():
                    found = summarise([scores[i] for i in chosen])
                    shown = [_round(v) for v in (found["accuracy"], *found["ci95"])]
                    facts = [_round(system.facts[seed].get(k)) for k in names]
                    out.writerow([experiment, system.row, system.name, seed, group, found["n"], *shown, *facts])


def accuracy_table(
    findings: Findings, names: Sequence[str], *, more: Sequence[tuple[str, Any]] = (), first: Sequence[list[str]] = ()
) -> str:
    """Rows of systems; columns: every group of questions, and `more`, each a heading and a function of the system.

    `first`: whole rows that stand above (baselines).
    """
    shown = [n for n in names if n in findings]
    head = ["", *(f"{g} ({len(q):,})" for g, q in findings.groups.items()), *(h for h, _ in more)]
    rows = [list(f) for f in first]
    for name in shown:
        cells = [percent(findings.estimate(name, g)) for g in findings.groups]
        rows.append([findings[name].title, *cells, *(emit(findings[name]) for _, emit in more)])
    rows = [r + [""] * (len(head) - len(r)) for r in rows]
    return table(head, rows, right=tuple(range(1, len(head))))


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


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def size(count: float | None) -> str:
    """Bytes for people."""
    if count is None:
        return "–"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _limits(findings: Findings) -> list[str]:
    seeds, asked = len(findings.seeds), len(findings.groups[ALL])
    between = (
        "one seed: the intervals are over questions alone, and say nothing of what another seed would give"
        if seeds == 1
        else f"{seeds} seeds: the intervals resample seeds and questions, but so few seeds underestimate what they vary"
    )
    return [
        f"{asked:,} test questions and {between}.",
        "One set of learning rates for each row, not tuned; another budget, other data or parts may turn the order.",
    ]


def _made(findings: Findings, command: str) -> str:
    m = findings.machine
    kept = sum(o.kept for o in findings.outcomes)
    lines = [
        f"- command: `{command}`",
        f"- date: {datetime.now(UTC).date().isoformat()}",
        f"- machine: {m.get('cpu', '?')}, {m.get('cores', '?')} cores, {size(m.get('memory_bytes'))}, "
        f"{m.get('device', '?')}; torch used {torch.get_num_threads()} thread(s)",
        f"- versions: opticnerve {__version__}, Python {m.get('python', '?')}, torch {m.get('torch', '?')}, "
        f"transformers {m.get('transformers', '?')}",
        f"- seeds: {', '.join(map(str, findings.seeds))}",
        f"- all rows together: {duration(findings.wall_seconds)}"
        + (f" ({kept} of {len(findings.outcomes)} kept from an earlier call)" if kept else ""),
        "- numbers: [results.csv](results.csv), a line per system, seed and type of question; 95 % intervals there are "
        "Wilson's",
    ]
    return "\n".join(lines)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _round(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value
