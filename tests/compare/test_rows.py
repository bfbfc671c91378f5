"""Rows: kept, resumed, set aside, failed, stopped; one in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pretended import pretend
from rich.console import Console

from opticnerve.compare import perform as performing
from opticnerve.compare import rows
from opticnerve.compare.rows import ExperimentRow, RunOptions, run_rows
from opticnerve.types import OpticNerveError

RECIPE = {"name": "r", "seed": 0, "stages": [{"name": "instruct", "steps": 3}]}
FIRST = ExperimentRow("first", {"first": "the first"}, RECIPE)
SECOND = ExperimentRow("second", {"second": "the second"}, RECIPE | {"name": "s"})


def test_finished_rows_are_kept(performed: list[dict[str, Any]], tmp_path: Path) -> None:
    once = run_rows([FIRST, SECOND], range(2), tmp_path, RunOptions())
    assert [(o.row.name, o.seed) for o in once] == [("first", 0), ("second", 0), ("first", 1), ("second", 1)]
    assert [s["recipe"]["seed"] for s in performed] == [0, 0, 1, 1]
    again = run_rows([FIRST, SECOND], range(3), tmp_path, RunOptions())
    assert [s["recipe"]["seed"] for s in performed[4:]] == [2, 2]  # only the new seed
    assert [o.kept for o in again] == [True] * 4 + [False] * 2
    assert again[0].record == once[0].record


def test_another_recipe_sets_the_old_run_aside(performed: list[dict[str, Any]], tmp_path: Path) -> None:
    run_rows([FIRST], [0], tmp_path, RunOptions())
    longer = ExperimentRow("first", FIRST.systems, RECIPE | {"stages": [{"name": "instruct", "steps": 4}]})
    console = Console(record=True, width=200)
    [outcome] = run_rows([longer], [0], tmp_path, RunOptions(console=console))
    assert len(performed) == 2
    assert not outcome.kept
    assert json.loads((tmp_path / "rows/first/seed-0.old-1/row.json").read_text())["identity"] == rows.identity(
        FIRST, 0
    )
    assert "set aside as seed-0.old-1" in console.export_text()


def test_another_version_is_another_row(monkeypatch: pytest.MonkeyPatch) -> None:
    before = rows.identity(FIRST, 0)
    assert rows.identity(FIRST, 1) != before
    monkeypatch.setattr("opticnerve.compare.rows.__version__", "99")
    assert rows.identity(FIRST, 0) != before


def test_a_row_that_fails_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = {"is": True}

    def perform(spec: dict[str, Any]) -> dict[str, Any]:
        if spec["recipe"] is not None and spec["recipe"]["name"] == "r" and broken["is"]:
            raise OpticNerveError("the learning rate is a banana")
        return pretend(spec)

    monkeypatch.setattr(rows, "_here", perform)
    both = ExperimentRow("both", {"both": "both"}, None, needs=("first", "second"))
    first, second, third = run_rows([FIRST, SECOND, both], [0], tmp_path, RunOptions())
    assert first.error == "the learning rate is a banana"
    assert first.record is None
    assert "banana" in (first.folder / "error.txt").read_text()
    assert second.record is not None
    assert third.error == "needs first, which did not finish"

    broken["is"] = False
    first, second, third = run_rows([FIRST, SECOND, both], [0], tmp_path, RunOptions())
    assert (first.error, second.kept, third.error) == (None, True, None)
    assert not (first.folder / "error.txt").exists()


def test_a_begun_row_is_handed_the_same_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What resumes it is the pipeline, in the folder in which it stopped."""
    stops = {"left": 1}

    def perform(spec: dict[str, Any]) -> dict[str, Any]:
        begun = Path(spec["folder"]) / "begun"
        if stops["left"]:
            stops["left"] -= 1
            begun.write_text("half")
            raise KeyboardInterrupt
        assert begun.exists() == (spec["systems"] == ["first"])
        return pretend(spec)

    monkeypatch.setattr(rows, "_here", perform)
    with pytest.raises(KeyboardInterrupt):
        run_rows([FIRST, SECOND], [0], tmp_path, RunOptions())
    assert all(o.record for o in run_rows([FIRST, SECOND], [0], tmp_path, RunOptions()))


def test_the_pipeline_resumes_where_a_recipe_was_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []

    def run_recipe(recipe: Any, folder: Path, *, resume: bool) -> dict[str, Any]:
        asked.append(resume)
        (folder / "recipe.yaml").write_text("")
        raise performing.Diverged("step 2: the loss is nan")

    monkeypatch.setattr(performing, "run_recipe", run_recipe)
    monkeypatch.setattr(performing.recipes, "load", lambda raw: raw)
    spec = {"recipe": RECIPE, "folder": str(tmp_path), "asks": [], "systems": ["first"], "needs": []}
    found = performing.perform(spec)
    performing.perform(spec)
    assert asked == [False, True]
    assert found["diverged"] == "step 2: the loss is nan"  # a finding, and no failure
    assert found["systems"] == {}


def test_weights_of_finished_rows_go_unless_wanted(performed: list[dict[str, Any]], tmp_path: Path) -> None:
    kept = ExperimentRow("kept", {"kept": "kept"}, RECIPE, keep_weights=True)
    run_rows([FIRST, kept], [0], tmp_path / "a", RunOptions())
    assert not list((tmp_path / "a/rows/first").rglob("*.safetensors"))
    assert list((tmp_path / "a/rows/kept").rglob("*.safetensors"))
    run_rows([FIRST], [0], tmp_path / "b", RunOptions(keep_models=True))
    assert list((tmp_path / "b/rows/first").rglob("*.safetensors"))


def test_memory_is_measured_by_a_short_run_of_the_first_seed(performed: list[dict[str, Any]], tmp_path: Path) -> None:
    run_rows([FIRST], range(2), tmp_path, RunOptions(isolated=True, memory_steps=2))
    real, probe, second = performed
    assert probe["folder"].endswith("seed-0/memory")
    assert [s["steps"] for s in probe["recipe"]["stages"]] == [2]
    assert probe["recipe"]["evaluate"] == []
    assert (real["recipe"]["seed"], second["recipe"]["seed"]) == (0, 1)
    assert not Path(probe["folder"]).exists()


def test_time_left_is_from_the_same_rows_where_they_are_known() -> None:
    assert rows.time_left([FIRST, SECOND], {"first": [10.0, 20.0]}) == 30.0
    assert rows.time_left([FIRST, SECOND], {"first": [10.0], "second": [50.0]}) == 60.0
    assert rows.time_left([FIRST], {}) is None
    assert rows.time_left([], {"first": [1.0]}) is None


def test_progress_names_row_seed_and_score(performed: list[dict[str, Any]], tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    run_rows([FIRST, SECOND], [0], tmp_path, RunOptions(console=console))
    lines = [line for line in console.export_text().splitlines() if "seed 0 " in line and "/2" in line]
    assert "first" in lines[0]
    assert "100.0%" in lines[0]
    assert "left" in lines[0]
    assert "left" not in lines[1]


# -- a process of its own ---------------------------------------------------------------------------------------------


def spec_of(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"recipe": None, "folder": str(folder), "asks": [], "systems": [], "needs": [], **changes}


@pytest.mark.slow
def test_a_worker_hands_its_outcome_back(tmp_path: Path) -> None:
    assert rows.in_process(spec_of(tmp_path / "row"))["systems"] == {}
    with pytest.raises(rows.RowFailed, match="model: is missing"):
        rows.in_process(spec_of(tmp_path / "bad", recipe={"name": "no model"}))
    assert "RecipeError" in (tmp_path / "bad" / "log.txt").read_text()


def as_worker(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    popen = subprocess.Popen
    monkeypatch.setattr(
        rows.subprocess, "Popen", lambda words, **options: popen([sys.executable, "-c", code, words[-1]], **options)
    )


def test_a_worker_that_dies_is_a_failure_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    as_worker(monkeypatch, "import sys; print('out of memory', file=sys.stderr); sys.exit(9)")
    with pytest.raises(rows.RowFailed, match=r"ended with code 9.*out of memory"):
        rows.in_process(spec_of(tmp_path))


def test_ctrl_c_reaches_the_worker_once_and_waits_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = (
        "import pathlib, signal, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def stop(*_):\n"
        "    with (folder / 'signals').open('a') as f: f.write('x')\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "(folder / 'ready').touch()\n"
        "while not (folder / 'signals').exists(): time.sleep(0.01)\n"
        "time.sleep(0.3); (folder / 'saved').touch(); sys.exit(130)\n"
    )
    as_worker(monkeypatch, code)

    def press() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            rows.in_process(spec_of(tmp_path / "row"))
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "signals").read_text() == "x"
