"""`opticnerve sweep`: every combination once, finished runs kept, one table with intervals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from errors import refused
from opticnerve import recipe as recipes
from opticnerve.cli.main import app
from opticnerve.common import atomic
from opticnerve.compare import rows as engine
from opticnerve.compare import sweep

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def recipe(language_folder: Callable[..., str], vision_folder: Callable[..., str], tmp_path: Path) -> Path:
    questions = str(tiny.save_questions(tmp_path))
    stage = {
        "name": "s", "train": {"connector": 1e-3}, "data": [{"path": questions}], "batch_size": 2, "steps": 2,
        "validate": {"data": {"path": questions}, "every": 1},
    }  # fmt: skip
    encoder = {"type": "hf_vision", "name": vision_folder("clip_vision_model")}
    model = {"language": {"name": language_folder("llama")}, "image": {"encoder": encoder}}
    asked = {"data": {"path": questions}, "sample": 4, "max_new_tokens": 2}
    raw = {"precision": "fp32", "model": model, "stages": [stage], "evaluate": [asked]}
    path = tmp_path / "tried.yaml"
    atomic.write(path, recipes.dump(recipes.load(raw)))
    return path


def test_settings_are_every_combination() -> None:
    assert sweep.settings(["a=1,2", "b=[x,y]", "c=3,4"]) == [
        ["a=1", "b=[x,y]", "c=3"], ["a=1", "b=[x,y]", "c=4"], ["a=2", "b=[x,y]", "c=3"], ["a=2", "b=[x,y]", "c=4"],
    ]  # fmt: skip
    with refused("empty"):
        sweep.settings(["a=1"])
    with refused("wrong-type", "a"):
        sweep.settings(["a"])
    with refused("conflict"):
        sweep.settings(["a=1,1"])


def test_a_stopped_sweep_keeps_what_is_finished(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["sweep", str(recipe), "stages.0.train.connector=1e-3,3e-3", "seed=0", "--out", str(tmp_path / "out")]
    own, performed = engine._here, list[str]()

    def stopped(spec: dict[str, Any]) -> dict[str, Any]:
        if performed:
            raise KeyboardInterrupt
        performed.append(spec["folder"])
        return own(spec)

    monkeypatch.setattr(engine, "_here", stopped)
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code != 0
    monkeypatch.setattr(engine, "_here", lambda spec: performed.append(spec["folder"]) or own(spec))
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, ended.output
    assert len(performed) == len(set(performed)) == 2  # none was run twice
    table = (tmp_path / "out" / "sweep.md").read_text()
    assert "| `stages.0.train.connector=1e-3` |" in table
    assert "| `stages.0.train.connector=3e-3` |" in table
    assert table.count(" % (") == 2  # an accuracy with its interval each


def test_a_stage_that_goes_by_a_score(recipe: Path, tmp_path: Path) -> None:
    """Entries that a stage's `validate` names are asked, whichever of them the sweep counts the answers of."""
    raw = recipes.load(recipe).model_dump(mode="json")
    raw["evaluate"] += [{**raw["evaluate"][0], "name": "more"}, {**raw["evaluate"][0], "name": "unasked"}]
    for metric in ("more", raw["evaluate"][0]["name"]):
        raw["stages"][0]["validate"]["metric"] = metric
        atomic.write(recipe, recipes.dump(recipes.load(raw)))
        out = tmp_path / metric.replace(" ", "-")
        _, [result, _] = sweep.run_sweep(lambda o: recipes.load(recipe, o), ["stages.0.train.connector=1e-3,3e-3"], out)
        assert result.record is not None, result.error
        assert result.record["facts"]["validation"]["best_step"]
        assert (out / "sweep.md").read_text().count(" % (") == 2


def test_a_setting_that_does_not_exist_runs_nothing(recipe: Path, tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["sweep", str(recipe), "stages.0.stepz=1,2", "--out", str(tmp_path / "out")])
    assert ended.exit_code != 0
    assert not (tmp_path / "out").exists()
