"""Does the loss depend on the picture? A model that looks is told from one that does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opticnerve.recipe import Recipe
from opticnerve.runs.card.warnings import gap_interval, warnings_of
from opticnerve.train import loop

pytestmark = pytest.mark.usefixtures("private_cache")
Train = Callable[..., Any]
Make = Callable[..., Recipe]
LEARNS: dict[str, Any] = {"steps": 60, "train": {"connector": 3e-2}, "batch_size": 6, "template": "caption"}


@pytest.mark.parametrize("cached", [False, True])
def test_a_model_that_looks(make_recipe: Make, train: Train, cached: bool) -> None:
    """Six pictures, six captions, learned by heart: with one another's pictures the loss is far higher."""
    _, result = train(make_recipe(**LEARNS, cache_features=cached))
    use = result.image_use
    assert use["n"] == 6
    assert use["other"] > use["own"] + 0.2
    assert use["ci95"][0] > 0
    assert use["other_minus_own"] == pytest.approx(use["other"] - use["own"])
    assert warnings_of({"stages": [result.to_dict()]}) == []


def test_a_model_that_does_not_look_is_told(make_recipe: Make, train: Train, data: Path, tmp_path: Path) -> None:
    """All pictures have the same caption: there is nothing to look for."""
    folder = tmp_path / "same"
    folder.mkdir()
    lines = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    same = [{"image": line["image"], "caption": "a red circle"} for line in lines]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in same))
    spec = {"path": str(folder / "captions.jsonl"), "media": str(data)}
    _, result = train(make_recipe(**{**LEARNS, "data": [spec], "steps": 30}))
    ((title, text),) = warnings_of({"stages": [result.to_dict()]})
    assert title == "THE LOSS DOES NOT DEPEND ON THE PICTURE"
    assert "stage align" in text
    assert "6 of its own samples" in text


def test_it_changes_nothing(make_recipe: Make, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(train={"connector": 1e-2, "language.lora": 1e-2}, lora={"rank": 2, "dropout": 0.3}, steps=2)
    one, _ = train(recipe, "one")
    after = torch.rand(3)
    monkeypatch.setattr(loop, "image_use", lambda *_: None)
    other, _ = train(recipe, "other")
    assert torch.equal(torch.rand(3), after)  # the random numbers of the stage that follows
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor)


def test_too_few_pictures_to_tell(make_recipe: Make, train: Train, data: Path) -> None:
    _, result = train(make_recipe(data=[{"path": str(data / "captions.jsonl"), "limit": 3}], steps=1))
    assert result.image_use is None


class TestAnswers:
    """Accuracy with the real picture against that with a blank one, on the same questions."""

    @pytest.mark.parametrize(
        ("n", "real", "blank", "title"),
        [
            (500, 0.86, 0.50, None),
            (500, 0.52, 0.50, "DO NOT DEPEND"),
            (500, 0.40, 0.50, "DO NOT DEPEND"),
            (100_000, 0.52, 0.50, "DO NOT DEPEND"),  # as sure as can be, and next to nothing
            (20, 0.60, 0.50, "CANNOT BE TOLD"),
            (2000, 0.56, 0.50, None),
        ],
    )
    def test_what_is_said(self, n: int, real: float, blank: float, title: str | None) -> None:
        found = warnings_of({"image_dependence": {"n": n, "real": real, "blank": blank, "shuffled": blank}})
        assert [str(title) in words for words, _ in found] == ([] if title is None else [True])

    def test_the_interval(self) -> None:
        """By hand: Wilson's of 56/70 is 0.6918 to 0.8764, of 42/70 0.4832 to 0.7065; 0.2 less and more the roots of
        0.1082² + 0.1065² and 0.0764² + 0.1168²."""
        low, high = gap_interval({"n": 70, "real": 56 / 70, "blank": 42 / 70})
        assert (low, high) == (pytest.approx(0.0482, abs=2e-3), pytest.approx(0.3396, abs=2e-3))
