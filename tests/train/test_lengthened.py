"""A run that is made longer when it is resumed: exact where the schedule allows it, refused where not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from errors import refused
from opticnerve import recipe as recipes
from opticnerve.common import drawing
from opticnerve.recipe import Recipe
from opticnerve.runs.pipeline import run_recipe
from opticnerve.train import checkpoint
from opticnerve.train.optim import check_lengthened

pytestmark = pytest.mark.usefixtures("private_cache")
Make = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_DPI", 30)


@pytest.fixture
def recipe_of(make_recipe: Make) -> Make:
    """A recipe of one stage (and `later` ones) whose schedule does not look at its end; the shortest shows the 64
    pictures that a connector is calibrated on."""

    def make(later: tuple[str, ...] = (), **stage: Any) -> Recipe:
        one = make_recipe(**{"schedule": "constant", "batch_size": 16, "steps": 4, "save_every": 3, **stage})
        raw = one.model_dump(mode="json")
        raw["stages"] += [{**raw["stages"][0], "name": name} for name in later]
        return recipes.load({**raw, "forgetting": False})

    return make


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "stages/0-align/metrics.jsonl").read_text().splitlines()]


def same(one: Path, other: Path) -> None:
    a, b = (load_file(run / "trained.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(t, b[n]) for n, t in a.items())
    assert losses(one) == losses(other)


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"steps": 4}, {"steps": 8}),
        ({"steps": 4, "pack": {"tokens": 100, "window": 6}}, {"steps": 8, "pack": {"tokens": 100, "window": 6}}),
        ({"steps": None, "epochs": 11}, {"steps": None, "epochs": 22}),  # 5 and 9 steps
        ({"steps": 6, "train": {"language.lora": 1e-2}, "lora": {"rank": 2, "dropout": 0.2}},
         {"steps": None, "epochs": 22, "train": {"language.lora": 1e-2}, "lora": {"rank": 2, "dropout": 0.2}}),
    ],
    ids=["steps", "packed", "epochs", "dropout, steps to epochs"],
)  # fmt: skip
def test_a_finished_run_goes_on_as_if_uninterrupted(
    recipe_of: Make, tmp_path: Path, short: dict[str, Any], long: dict[str, Any]
) -> None:
    run_recipe(recipe_of(**long), tmp_path / "whole")
    run_recipe(recipe_of(**short), tmp_path / "run", command="opticnerve train")
    results = run_recipe(recipe_of(**long), tmp_path / "run", resume=True, command="opticnerve train --resume")
    same(tmp_path / "run", tmp_path / "whole")
    assert results["stages"][0]["steps"] == len(losses(tmp_path / "run")) > (short["steps"] or 0)
    assert results["command"] == "opticnerve train\nopticnerve train --resume"
    kept = recipes.load(tmp_path / "run" / "recipe.yaml").stages[0]
    assert (kept.steps, kept.epochs) == (long["steps"], long.get("epochs"))


def test_stopped_again_after_it_was_made_longer(
    recipe_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's own recipe is the longer one from the first step on; and so is an unfinished run's."""
    run_recipe(recipe_of(steps=9), tmp_path / "whole")
    saved = checkpoint.save

    def stop(folder: Path, step: int, *args: Any, **options: Any) -> Path:
        saved(folder, step, *args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stop)
        for recipe, resume in ((recipe_of(steps=4), False), (recipe_of(steps=9), True)):  # after step 3, after step 6
            with pytest.raises(KeyboardInterrupt):
                run_recipe(recipe, tmp_path / "run", resume=resume)
    run_recipe(recipes.load(tmp_path / "run" / "recipe.yaml"), tmp_path / "run", resume=True)
    same(tmp_path / "run", tmp_path / "whole")


def test_what_cannot_be_made_longer(recipe_of: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_recipe(recipe_of(schedule="cosine"), run)
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    with refused("conflict", "align", "cosine", 4, 8, "from"):
        run_recipe(recipe_of(schedule="cosine", steps=8), run, resume=True)
    with refused("conflict", 2, 4):
        run_recipe(recipe_of(schedule="cosine", steps=2), run, resume=True)
    with refused("mismatch", "batch_size"):
        run_recipe(recipe_of(schedule="cosine", steps=8, batch_size=8), run, resume=True)
    changed = [f for f, held in before.items() if f.read_bytes() != held and f.name not in ("results.json", "card.md")]
    assert changed == []  # it is finished still


def test_what_left_nothing_to_go_on_from(recipe_of: Make, tmp_path: Path) -> None:
    run_recipe(recipe_of(save_every=None), tmp_path / "bare")
    with refused("missing-file", "align", "save_every", tmp_path / "bare"):
        run_recipe(recipe_of(save_every=None, steps=8), tmp_path / "bare", resume=True)
    run_recipe(recipe_of(later=("then",)), tmp_path / "two")
    with refused("conflict", "align", "1-then"):
        run_recipe(recipe_of(later=("then",), steps=8), tmp_path / "two", resume=True)


def test_other_data_are_still_refused(make_recipe: Make, recipe_of: Make, tmp_path: Path) -> None:
    path = tiny.save_captions(tmp_path / "mine")
    data = [{"path": str(path)}]
    run_recipe(recipe_of(data=data), tmp_path / "run")
    path.write_text(path.read_text().replace("foxes", "hounds"))
    with refused("mismatch", "sha256 was "):
        run_recipe(recipe_of(data=data, steps=8), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("schedule", "warmup", "done", "exact"),
    [("constant", 0.0, 10, True), ("constant", 0.03, 10, True), ("constant", 0.5, 10, False),
     ("linear", 0.0, 2, False), ("cosine", 0.0, 1, True), ("cosine", 0.0, 2, False)],
)  # fmt: skip
def test_the_learning_rate_decides(make_recipe: Make, schedule: str, warmup: float, done: int, exact: bool) -> None:
    """One of ten steps made twenty; the first step of a decay is at its height in both."""
    stage = make_recipe(schedule=schedule, warmup=warmup).stages[0]
    if exact:
        check_lengthened(stage, done, 10, 20)
    else:
        with refused("conflict", 10, 20):
            check_lengthened(stage, done, 10, 20)
