"""What a report says, and its table of numbers."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from errors import refused
from opticnerve.compare import plots
from opticnerve.compare import report as reports
from opticnerve.compare.perform import between, optimizer_bytes
from opticnerve.compare.report import Findings, System, groups_of, read_answers
from opticnerve.compare.rows import ExperimentRow, RowResult
from opticnerve.compare.stats import Estimate


@pytest.fixture
def findings() -> Findings:
    systems = {
        "good": System("good", "the good", "row", {0: [1, 1, 1, 0], 1: [1, 1, 0, 0]}, {0: {"trained": 7}, 1: {"trained": 7}}),
        "poor": System("poor", "the poor", "row", {0: [0, 0, 0, 0]}, {0: {}}),
    }  # fmt: skip
    outcomes = [
        RowResult(
            ExperimentRow("row", {"good": "the good"}), s, Path("x"), {"wall_seconds": 3.0, "facts": {"machine": {}}}
        )
        for s in (0, 1)
    ]
    return Findings(None, {}, systems, groups_of(["a", "a", "a", "b"]), outcomes, {}, {})


def test_verdicts_claim_no_more_than_their_interval() -> None:
    def emit(mean: float, low: float, high: float) -> str:
        return reports.conclusion("A", "B", Estimate(mean, low, high, 2, 9))

    assert emit(0.1, 0.02, 0.2) == "A is ahead of B: +10.0 points (+2.0 to +20.0)."
    assert emit(-0.1, -0.2, -0.02).startswith("A is behind B")
    assert emit(0.1, -0.02, 0.2).startswith("A is not told apart from B")
    assert emit(0, 0, 0) == "A and B are right on the same questions."
    assert "cannot be compared" in reports.conclusion("A", "B", None)


def test_the_table_has_a_column_for_each_type(findings: Findings) -> None:
    text = reports.accuracy_table(
        findings, ["good", "absent"], more=[("seeds", lambda s: str(len(s.scores)))], first=[["base"]]
    )
    head, _, base, row = text.splitlines()
    assert head == "|  | all (4) | a (3) | b (1) | seeds |"
    assert base.startswith("| base |")
    assert row.startswith("| the good | 62.5 %")
    assert row.endswith("| 2 |")


def test_csv_has_a_line_per_system_seed_and_type(findings: Findings, tmp_path: Path) -> None:
    reports.write_csv(findings, tmp_path / "r.csv", "fusion")
    with (tmp_path / "r.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == (2 + 1) * 3
    first = lines[0]
    assert (first["system"], first["seed"], first["questions"], first["n"], first["accuracy"]) == (
        "good",
        "0",
        "all",
        "4",
        "0.75",
    )
    assert float(first["low"]) < 0.75 < float(first["high"])
    assert (first["trained"], lines[-1]["trained"]) == ("7", "")


def test_the_report_says_how_many_seeds_and_how_to_make_it_again(findings: Findings, tmp_path: Path) -> None:
    said = reports.ExperimentReport("Title", "What.", "How much.", shows=["Something."], does_not=["Everything."])
    path = reports.write(said, findings, tmp_path, command="opticnerve compare fusion --seeds 2", experiment="fusion")
    text = path.read_text()
    assert "4 test questions and 2 seeds" in text
    assert "`opticnerve compare fusion --seeds 2`" in text
    assert "Rows that failed" not in text
    findings.outcomes.append(RowResult(ExperimentRow("other", {}), 0, Path("x"), error="no <memory>"))
    assert (
        "`other`, seed 0: no \\<memory\\>"
        in reports.write(said, findings, tmp_path, command="", experiment="f").read_text()
    )


def test_sizes_of_optimizer_and_connector() -> None:
    parts = [("image.encoder", 10, False, "bfloat16"), ("image.connector", 100, True, "float32"),
             ("image.fusion", 5, True, "bfloat16"), ("language", 1000, False, "bfloat16")]  # fmt: skip
    table = {"rows": [dict(zip(("part", "parameters", "trained", "dtype"), p, strict=True)) for p in parts]}
    assert between(table) == 105
    assert optimizer_bytes(table) == 100 * 8 + 5 * 12
    assert [reports.size(v) for v in (None, 2**20, 3 * 2**30)] == ["–", "1.0 MiB", "3.00 GiB"]


def test_broken_answers_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{")
    with refused("damaged", tmp_path / "a.jsonl"):
        read_answers(tmp_path / "a.jsonl")


def test_types_come_the_most_frequent_first() -> None:
    assert groups_of(["b", "a", "a"]) == {"all": [0, 1, 2], "a": [1, 2], "b": [0]}
    assert groups_of(["all", "all"]) == {"all": [0, 1]}


def test_pictures_of_little_and_of_strange_names(tmp_path: Path) -> None:
    some = Estimate(0.5, 0.4, 0.6, 1, 9)
    made = [
        plots.dots({"all": {"a $x$ 画": some, "b": None}}, tmp_path / "1.png", title="T", note="n", lines={"all": 0.3}),
        plots.scatter({"a": (16, some)}, tmp_path / "2.png", title="T", note="n", x="x", log=True),
        plots.bands({"a": [([1, 2], [3.0, 2.0])], "b": []}, tmp_path / "3.png", title="T", note="n", x="x", threshold=1.0),
        plots.bars({"a": 1.0}, tmp_path / "4.png", title="T", note="n", x="x"),
    ]  # fmt: skip
    assert all(p.stat().st_size > 2000 for p in made)
