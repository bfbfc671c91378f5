"""Dual encoders and fusion classifiers go through the same loop as docked models, by the same promises."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from errors import refused
from opticnerve import recipe as recipes
from opticnerve.common.progress import Progress
from opticnerve.inference.load import load_any
from opticnerve.models.family import build
from opticnerve.recipe import Recipe
from opticnerve.runs.pipeline import run_recipe
from opticnerve.train.loop import Interrupted, run_stage
from opticnerve.types import DataError, RecipeError

pytestmark = pytest.mark.usefixtures("private_cache")
CONTRASTIVE = {"type": "contrastive", "duplicates": "mask"}
KINDS = ["dual", "early", "intermediate", "late"]


@pytest.fixture
def make(bert_folder: str, vision_folder: Callable[..., str], tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of a kind of model, with one stage; keywords change the stage."""
    captions, questions = tiny.save_captions(tmp_path, 8), tiny.save_questions(tmp_path)

    def made(kind: str, *, evaluate: bool = False, **stage: Any) -> Recipe:
        vision_encoder = {"encoder": {"type": "hf_vision", "name": vision_folder("siglip_vision_model")}}
        model: dict[str, Any] = {"text": {"encoder": {"name": bert_folder}}}
        if kind == "dual":
            model |= {"image": vision_encoder, "projection_dim": 8}
            own = {"objective": CONTRASTIVE, "train": {"image.projection": 1e-2, "text.projection": 1e-2}}
            asked = [{"name": n, "metric": n, "data": {"path": str(captions)}} for n in ("retrieval", "zero_shot")]
        else:
            small = {"width": 16, "depth": 1, "dropout": 0.1} | ({"pixels": 8} if kind == "early" else {})
            model |= {"timing": kind, "options": small | ({"heads": 2} if kind == "intermediate" else {})}
            model |= {"image": vision_encoder} if kind != "early" else {}
            own = {"objective": "classification", "train": {"classifier": 1e-2}}
            asked = [{"name": "vqa", "data": {"path": str(questions)}, "image_dependence": 4}]
        data = [{"path": str(captions if kind == "dual" else questions)}]
        chosen = {"name": "learn", "batch_size": 4, "steps": 6, "data": data, **own, **stage}
        return recipes.load(
            {
                "precision": "fp32", "model": model, "stages": [chosen], "forgetting": False,
                "evaluate": asked if evaluate else [],
            }
        )  # fmt: skip

    return made


def train(recipe: Recipe, folder: Path, **options: Any) -> tuple[Any, list[float]]:
    dock = build(recipe)
    run_stage(dock, recipe, recipe.stages[0], folder / "stages" / "0-learn", trained_before=set(), **options)
    lines = (folder / "stages" / "0-learn" / "metrics.jsonl").read_text().splitlines()
    return dock, [json.loads(line)["loss"] for line in lines]


def resumed(recipe: Recipe, folder: Path, *, stop_at: int) -> tuple[Any, list[float]]:
    """The same, stopped after a step and gone on with."""

    def stop(self: Progress, line: dict[str, Any]) -> None:
        if line["step"] == stop_at:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "update", stop)
        with pytest.raises(Interrupted):
            train(recipe, folder)
    return train(recipe, folder, resume=True)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_frozen_does_not_move_and_the_rest_does(kind: str, make: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make(kind)
    before = {n: t.clone() for n, t in build(recipe).model.state_dict().items()}
    dock, losses = train(recipe, tmp_path / "run")
    parts = tuple(f"{p}." for p in recipe.stages[0].train)
    moved = {n for n, t in dock.model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved
    assert all(n.startswith(parts) for n in moved)
    assert len(losses) == recipe.stages[0].steps


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_that_was_stopped_goes_on_as_if_it_had_not(
    kind: str, make: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = make(kind)
    whole, curve = train(recipe, tmp_path / "whole")
    broken, again = resumed(recipe, tmp_path / "cut", stop_at=3)
    assert again == curve
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(broken.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", ["dual", "intermediate", "late"])
def test_losses_by_source_add_up(kind: str, make: Callable[..., Recipe], tmp_path: Path) -> None:
    given = Path(make(kind).stages[0].data[0].path)
    lines = given.read_text().splitlines()
    halves = {"a.jsonl": lines[:3], "b.jsonl": lines[3:]}
    for name, some in halves.items():
        (given.parent / name).write_text("\n".join(some) + "\n")
    recipe = make(kind, data=[{"path": str(given.parent / name)} for name in halves], accumulate=2)
    train(recipe, tmp_path / "run")
    for line in map(json.loads, (tmp_path / "run/stages/0-learn/metrics.jsonl").read_text().splitlines()):
        parts = line["by_source"].values()
        assert sum(p["samples"] for p in parts) == line["samples"]
        assert sum(p["loss"] * p["samples"] for p in parts) == pytest.approx(line["loss"] * line["samples"])
        assert len({p["loss"] for p in parts}) == len(parts)


@pytest.mark.parametrize("kind", ["dual", "intermediate", "late"])
def test_cached_features_are_the_live_eye(kind: str, make: Callable[..., Recipe], tmp_path: Path) -> None:
    _, live = train(make(kind), tmp_path / "live")
    _, first = train(make(kind, cache_features=True), tmp_path / "first")
    _, second = train(make(kind, cache_features=True), tmp_path / "second")
    assert first == pytest.approx(live, rel=1e-5)
    assert second == first


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_run_its_card_and_the_model_it_leaves(kind: str, make: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make(kind, evaluate=True)
    results = run_recipe(recipe, tmp_path / "run")
    card = (tmp_path / "run" / "card.md").read_text()
    assert results["model"]["kind"] in card
    if kind == "dual":
        # Eight pictures with six captions: two of the captions have two pictures each.
        assert results["tasks"][0]["text_to_image"]["R@1"]["chance"] == pytest.approx((4 / 8 + 2 * 2 / 8) / 6)
        assert [t["name"] for t in results["untrained"]] == ["retrieval", "zero_shot"]
        assert "R@1 untrained" in card
    else:
        rows = [json.loads(line) for line in (tmp_path / "run" / "answers" / "vqa.jsonl").read_text().splitlines()]
        assert len(rows) == results["tasks"][0]["n"]
        assert sum(r["right"] for r in rows) / len(rows) == pytest.approx(results["tasks"][0]["accuracy"])
    model, _ = load_any(str(tmp_path / "run"))
    kept = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(t, kept[n]) for n, t in model.state_dict().items() if n in kept)
    # A finished run resumed does nothing anew.
    again = run_recipe(recipe, tmp_path / "run", resume=True)
    assert again["stages"] == results["stages"]


def test_an_answer_outside_the_closed_set_names_the_sample(make: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make("late")
    model = recipe.model.model_copy(update={"answers": ["yes", "perhaps"]})
    with refused("answer", "questions.jsonl:2", "'no'", "'yes', 'perhaps'", "model.answers", error=DataError):
        train(recipe.model_copy(update={"model": model}), tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "stage", "facts"),
    [
        ("dual", {"train": {"connector": 1e-3}}, ["stages.0.train.connector: ", "a dual encoder"]),
        ("dual", {"train": {"image.projektion": 1e-3}}, ["'image.projektion'", "'image.projection'"]),
        ("dual", {"objective": "next_token"}, ["next_token", "a dual encoder", "objective: contrastive"]),
        ("late", {"objective": CONTRASTIVE}, ["contrastive", "a fusion classifier", "objective: classification"]),
        (
            "dual", {"train": {"image.encoder.last(1)": 1e-3}, "cache_features": True},
            ["stages.0.cache_features: ", "trains the image encoder"],
        ),
        ("early", {"cache_features": True}, ["stages.0.cache_features: ", "no image tower"]),
        ("dual", {"train": {"text.encoder": 1e-3, "text.encoder.last(1)": 1e-3}}, ["stages.0: train: encoder ", "remove encoder.last(N)"]),
    ],
)  # fmt: skip
def test_recipes_that_contradict_themselves(
    kind: str, stage: dict[str, Any], facts: list[str], make: Callable[..., Recipe]
) -> None:
    with refused("recipe", *facts, error=RecipeError):
        make(kind, **stage)


def test_gradient_checkpointing_is_for_language_models(make: Callable[..., Recipe], tmp_path: Path) -> None:
    with refused("unsupported", "gradient_checkpointing"):
        train(make("dual", gradient_checkpointing=True), tmp_path / "run")


@pytest.mark.parametrize("kind", ["dual", "late"])
def test_a_held_out_curve_moves_nothing(kind: str, make: Callable[..., Recipe], tmp_path: Path) -> None:
    data = [spec.model_dump() for spec in make(kind).stages[0].data]
    _, without = train(make(kind), tmp_path / "without")
    _, watched = train(make(kind, validate={"data": data, "every": 2}), tmp_path / "with")
    assert watched == without
    lines = (tmp_path / "with" / "stages" / "0-learn" / "metrics.jsonl").read_text().splitlines()
    looks = [look["loss"] for line in lines if (look := json.loads(line).get("validation"))]
    assert len(looks) == 3
    assert looks[-1] < looks[0]
