"""A stage that learns to read boxed words: resumed exactly, and what reads is the connector that is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import pytest
import torch

import tiny
from opticnerve import recipe as recipes
from opticnerve.inference.load import load_model
from opticnerve.models.vlm.build import Dock
from opticnerve.recipe import Recipe

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def recipe(tmp_path: Path, language_folder: Callable[..., str]) -> Recipe:
    rows = []
    for i in range(4):
        picture = PIL.Image.new("RGB", (64 - 8 * i, 32), "white")
        PIL.ImageDraw.Draw(picture).text((4, 4), "TOTAL", fill="black")
        picture.save(tmp_path / f"{i}.png")
        objects = [{"label": "TOTAL", "box": [4, 4, 34, 16]}]
        rows.append({"image": f"{i}.png", "question": "Read.", "answer": "<objects>", "objects": objects})
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "name": "letters", "objective": "text_spotting", "train": {"image.encoder": 1e-3, "image.connector": 1e-3},
        "data": [{"path": str(tmp_path / "words.jsonl"), "boxes": {}}], "batch_size": 2, "steps": 6, "save_every": 2,
    }  # fmt: skip
    connector = {"type": "text_spotter", "width": 4, "hidden": 8}
    image = {"encoder": tiny.native_vision(min_patches=4, max_patches=24), "connector": connector}
    model = {"language": {"name": language_folder()}, "image": image}
    return recipes.load({"precision": "fp32", "model": model, "stages": [stage]})


def test_resumed_is_uninterrupted(recipe: Recipe, resumed_exactly: Callable[..., Any], tmp_path: Path) -> None:
    resumed_exactly(recipe, stop_at=3)
    curves = []
    for run in ("whole", "broken"):
        folder = tmp_path / run / "stages" / "0-align"
        curves.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert curves[0] == curves[1] and curves[0][-1] < curves[0][0]


def test_what_reads_is_saved_and_the_language_model_is_as_it_was(
    recipe: Recipe, train: Callable[..., Any], tmp_path: Path
) -> None:
    train(recipe, "run")
    folder = tmp_path / "run" / "stages" / "0-align"
    rows = {row["part"]: row for row in json.loads((folder / "freeze.json").read_text())["rows"]}
    assert rows["image.connector"]["trained"] and rows["image.encoder"]["trained"] and not rows["language"]["trained"]
    model, _ = load_model(folder)
    fresh = Dock.build(recipe).model
    assert not torch.equal(model.image.connector.classify.weight, fresh.image.connector.classify.weight)
    kept = fresh.language_model.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.language_model.state_dict().items())
