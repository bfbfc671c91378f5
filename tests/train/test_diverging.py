"""A step whose loss or gradient is no number: named, its samples kept, and stopped or left out as the recipe says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from errors import refused
from opticnerve import recipe as recipes
from opticnerve.cli.main import app
from opticnerve.data.dataset.load import load_data
from opticnerve.models.vlm.build import dock_recipe
from opticnerve.recipe import DataSpec, Recipe
from opticnerve.runs.card.card import write_card
from opticnerve.runs.card.warnings import warnings_of
from opticnerve.train import divergence
from opticnerve.train.divergence import SAMPLES, Diverged
from opticnerve.train.optim import MasterAdamW

pytestmark = pytest.mark.usefixtures("private_cache")
Train = Callable[..., Any]
Make = Callable[..., Recipe]


def stage_folder(tmp_path: Path, run: str = "run") -> Path:
    return tmp_path / run / "stages" / "0-align"


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the gradient's norm of some steps (from 1, counted over a process's life) be infinite."""

    def at(*steps: int, first: int = 1) -> None:
        clip, now = MasterAdamW.clip, [first - 1]

        def broken(self: MasterAdamW, limit: float | None) -> torch.Tensor:
            norm = clip(self, limit)
            now[0] += 1
            return norm * float("inf") if now[0] in steps else norm

        monkeypatch.setattr(MasterAdamW, "clip", broken)

    return at


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def test_a_loss_that_is_no_number_stops_and_names_its_samples(make_recipe: Make, train: Train, tmp_path: Path) -> None:
    made = dock_recipe(recipe := make_recipe())
    with torch.no_grad():
        made.model.language_model.model.norm.weight[0] = float("nan")
    with refused("diverged", "stage align", "step 1", "the loss is nan", "captions-", "data show", error=Diverged):
        train(recipe, dock=made)
    assert len((stage_folder(tmp_path) / SAMPLES).read_text().splitlines()) == 4


def test_a_gradient_that_is_no_number_moves_nothing(make_recipe: Make, train: Train) -> None:
    made = dock_recipe(recipe := make_recipe())
    weight = next(made.model.image.connector.parameters())
    weight.register_hook(lambda grad: grad * float("inf"))
    before = weight.detach().clone()
    with refused("diverged", "step 1", "samples captions-", error=Diverged) as raised:
        train(recipe, dock=made)
    assert re.search(r"the loss is \d.*norm (inf|nan); ", str(raised.value))
    assert torch.equal(weight, before)


def test_the_samples_are_those_of_the_step(make_recipe: Make, train: Train, tmp_path: Path, spoil: Any) -> None:
    """They are read back as conversations with their pictures, and are what the step before did not see."""
    recipe = make_recipe(batch_size=3, steps=2)
    spoil(2)
    with pytest.raises(Diverged):
        train(recipe)
    path = stage_folder(tmp_path) / SAMPLES
    kept = load_data(DataSpec(path=str(path), media="/"))
    everything = {c.id: c for c in load_data(recipe.stages[0].data[0])}
    assert len(kept) == 3
    for c in kept:
        assert [m.text for m in c.messages] == [m.text for m in everything[c.id].messages]
        assert c.images[0].source == everything[c.id].images[0].source
    assert {json.loads(line)["step"] for line in path.read_text().splitlines()} == {2}


def test_data_show_shows_them(
    make_recipe: Make, train: Train, tmp_path: Path, spoil: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command that the message gives."""
    recipe = make_recipe(batch_size=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(recipes.dump(recipe))
    spoil(1)
    with pytest.raises(Diverged) as raised:
        train(recipe)
    words = str(raised.value).partition("`opticnerve ")[2].partition("`")[0].split()
    assert words[:2] == ["data", "show"]
    assert not app(words, standalone_mode=False)
    shown = capsys.readouterr().out
    assert str(stage_folder(tmp_path) / SAMPLES) in shown
    assert ".png" in shown


@pytest.mark.parametrize("source", ["bytes", "opened"])
def test_pictures_without_a_file_get_one(tmp_path: Path, source: str) -> None:
    from opticnerve.types import ask

    path = tiny.save_captions(tmp_path / "data", 1).parent / "0.png"
    given: Any = path.read_bytes() if source == "bytes" else tiny.picture(0)
    divergence._keep(tmp_path / SAMPLES, 3, "why", [ask("what?", given, given, answer="this")])
    (kept,) = load_data(DataSpec(path=str(tmp_path / SAMPLES), media="/"))
    assert len({i.source for i in kept.images}) == 2
    assert all(Path(str(i.source)).is_file() for i in kept.images)


class TestSkip:
    def test_the_step_is_left_out_and_counted(
        self, make_recipe: Make, train: Train, tmp_path: Path, spoil: Any
    ) -> None:
        recipe = make_recipe(on_divergence="skip", steps=4)
        spoil(2, 3)
        _, result = train(recipe)
        assert result.left_out == [2, 3]
        lines = [json.loads(x) for x in (stage_folder(tmp_path) / "metrics.jsonl").read_text().splitlines()]
        assert [x["step"] for x in lines] == [1, 2, 3, 4]
        assert [x["loss"] is None for x in lines] == [False, True, True, False]
        assert "norm inf" in lines[1]["left_out"]
        assert len((stage_folder(tmp_path) / SAMPLES).read_text().splitlines()) == 8

    def test_nothing_moves_not_even_a_batch_norm(self, make_recipe: Make, train: Train, spoil: Any) -> None:
        """Two steps, of which the second is left out, end where the first one alone ends."""
        options = {"vision_encoder": "test_efficientnet", "train": {"connector": 1e-2, "encoder": 1e-3}, "schedule": "constant",
                   "warmup": 0, "on_divergence": "skip"}  # fmt: skip
        one, _ = train(make_recipe(**options, steps=2), "one", stop_at=1)
        spoil(2)
        two, _ = train(make_recipe(**options, steps=2), "two")
        last, other = weights(one.model), weights(two.model)
        assert [n for n in last if not torch.equal(last[n], other[n])] == []

    def test_a_resumed_run_leaves_out_the_same(
        self, make_recipe: Make, train: Train, tmp_path: Path, spoil: Any
    ) -> None:
        recipe = make_recipe(on_divergence="skip", steps=5)
        spoil(2, 4)
        whole, wanted = train(recipe, "whole")
        spoil(2, 4)
        train(recipe, "broken", stop_at=2)
        spoil(4, first=3)
        again, found = train(recipe, "broken", resume=True)
        assert found.left_out == wanted.left_out == [2, 4]
        kept = [(stage_folder(tmp_path, run) / SAMPLES).read_text() for run in ("whole", "broken")]
        assert kept[0] == kept[1]
        assert all(
            torch.equal(a, b)
            for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True)
        )

    def test_too_many_in_a_row_stop_the_run(
        self, make_recipe: Make, train: Train, monkeypatch: pytest.MonkeyPatch, spoil: Any
    ) -> None:
        monkeypatch.setattr(divergence, "MOST_IN_A_ROW", 3)
        recipe = make_recipe(on_divergence="skip", steps=8)
        spoil(1, 2, 4, 5, 6)
        with refused("diverged", "step 6", "3 steps", error=Diverged):
            train(recipe)


def test_the_card_names_the_steps(tmp_path: Path) -> None:
    results = {"stages": [{"name": "align", "steps": 9, "left_out": [2, 7]}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    card = write_card(tmp_path).read_text()
    assert "2 STEPS WERE LEFT OUT" in card
    assert "step 2, 7" in card
    assert card.index("LEFT OUT") < card.index("## What was docked")
    assert warnings_of({"stages": [{"name": "align", "left_out": []}]}) == []
