"""`opticnerve compare`: what it passes on, how it stops, and its exit codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from opticnerve.cli.compare import app
from opticnerve.compare import experiment as experiments
from opticnerve.compare.experiment import ExperimentResult
from opticnerve.compare.rows import ExperimentRow, RowResult


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The experiment replaced by one that notes how it was called; `answer` is what it returns or raises."""
    seen: dict[str, Any] = {"answer": ExperimentResult([], tmp_path / "report.md")}

    def run(experiment: Any, base: Any, out: Path, **options: Any) -> ExperimentResult:
        seen.update(experiment=experiment, base=base, out=out, **options)
        if isinstance(seen["answer"], BaseException):
            raise seen["answer"]
        return seen["answer"]

    monkeypatch.setattr(experiments, "run", run)
    return seen


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: CliRunner().invoke(app, [str(w) for w in words])


def test_options_reach_the_experiment(compare: Callable[..., Any], asked: dict[str, Any], tmp_path: Path) -> None:
    ran = compare(
        "fusion", "precision=fp32", "--out", tmp_path, "--seeds", 3, "--scale", 2, "--rows", "early, late", "--quick"
    )
    assert ran.exit_code == 0, ran.output
    assert asked["experiment"].name == "fusion"
    assert asked["base"].recipe.precision == "fp32"
    assert (asked["out"], asked["seeds"], asked["scale"], asked["only"]) == (tmp_path, 3, 2.0, ["early", "late"])
    assert asked["quick"]
    assert asked["report"] is None
    assert asked["command"] == (
        f"opticnerve compare fusion precision=fp32 --out {tmp_path} --seeds 3 --scale 2 --rows 'early, late' --quick"
    )
    assert "report.md" in ran.output


@pytest.mark.parametrize("name", ["connectors", "stages"])
def test_defaults(name: str, compare: Callable[..., Any], asked: dict[str, Any]) -> None:
    assert compare(name).exit_code == 0
    assert asked["out"] == Path("runs") / f"compare-{name}"
    assert (asked["command"], asked["scale"], asked["only"], asked["keep_models"]) == (
        f"opticnerve compare {name}",
        1.0,
        None,
        False,
    )


def test_ctrl_c_says_how_to_go_on(compare: Callable[..., Any], asked: dict[str, Any]) -> None:
    asked["answer"] = KeyboardInterrupt()
    ran = compare("stages", "--seeds", 2)
    assert ran.exit_code == 130
    assert "opticnerve compare stages --seeds 2" in ran.output


def test_failed_rows_are_listed_and_the_code_is_not_zero(
    compare: Callable[..., Any], asked: dict[str, Any], tmp_path: Path
) -> None:
    failed = RowResult(ExperimentRow("qformer", {}), 1, tmp_path / "rows/qformer/seed-1", error="no memory")
    asked["answer"] = ExperimentResult([failed], None)
    ran = compare("connectors")
    assert ran.exit_code == 1
    assert "qformer, seed 1: no memory" in ran.output


def test_what_is_wrong_with_a_recipe_is_said(compare: Callable[..., Any], recipe_file: Path) -> None:
    ran = compare("stages", "--recipe", recipe_file)
    assert ran.exit_code == 1
    assert "has 1 stage(s); compare wants at least two" in ran.output


def test_help_names_every_experiment(compare: Callable[..., Any]) -> None:
    assert isinstance(app, typer.Typer)
    ran = compare("--help")
    assert all(name in ran.output for name in ("fusion", "connectors", "stages"))
