"""A held-out curve beside training's: it moves nothing, counts every token once, and goes on exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from safetensors.torch import load_file

import tiny
from errors import refused
from opticnerve import recipe as recipes
from opticnerve.common.progress import Progress
from opticnerve.data.dataset.load import load_examples
from opticnerve.models.vlm.build import dock_recipe
from opticnerve.recipe import DataSpec, Recipe
from opticnerve.recipe.stage import ValidateSpec
from opticnerve.runs.card.card import write_card
from opticnerve.runs.card.warnings import warnings_of
from opticnerve.runs.folder import read_metrics
from opticnerve.runs.pipeline import run_recipe
from opticnerve.train.optim import MasterAdamW

pytestmark = pytest.mark.usefixtures("private_cache")
Make = Callable[..., Recipe]
Train = Callable[..., Any]
LORA = {"train": {"connector": 1e-2, "language.lora": 1e-2}, "lora": {"rank": 2, "dropout": 0.3}}


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five captions of other lengths: no batch size divides them."""
    folder = tmp_path_factory.mktemp("held")
    lines = []
    for i in range(5):
        tiny.picture(20 + i).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": "a blue fox " * (i + 1)}))
    (folder / "held.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "held.jsonl")


def lines(tmp_path: Path, run: str) -> list[dict[str, Any]]:
    return read_metrics(tmp_path / run / "stages/0-align/metrics.jsonl")


def looks(tmp_path: Path, run: str) -> dict[int, dict[str, Any]]:
    return {line["step"]: line["validation"] for line in lines(tmp_path, run) if "validation" in line}


def weights(tmp_path: Path, run: str) -> dict[str, torch.Tensor]:
    return load_file(tmp_path / run / "stages/0-align/trained.safetensors")


@pytest.mark.parametrize("more", [{}, {"workers": 1}], ids=["here", "workers"])
def test_the_training_curve_is_the_same_bits_with_it_and_without(
    make_recipe: Make, train: Train, held: str, tmp_path: Path, more: dict[str, Any]
) -> None:
    options = {**LORA, "pack": 100, "steps": 4, **more}
    train(make_recipe(**options), "without")
    train(make_recipe(**options, validate={"data": {"path": held}, "every": 1}), "with")
    for a, b in zip(lines(tmp_path, "without"), lines(tmp_path, "with"), strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
    one, other = weights(tmp_path, "without"), weights(tmp_path, "with")
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert sorted(looks(tmp_path, "with")) == [1, 2, 3, 4]


def test_a_resumed_stage_knows_best_and_patience(make_recipe: Make, train: Train, held: str, tmp_path: Path) -> None:
    """At such a rate the loss rises; the stage stops by itself, and leaves its best weights."""
    watch = {"data": {"path": held}, "every": 1, "keep": "best", "patience": 3}
    recipe = make_recipe(train={"connector": 3.0}, steps=30, schedule="constant", validate=watch)
    _, whole = train(recipe, "whole")
    stopped = whole.validation["best_step"] + 2  # between the best look and the end of patience
    assert 0 < stopped < whole.steps < 30
    train(recipe, "again", stop_at=stopped)
    _, again = train(recipe, "again", resume=True)
    assert again.validation == whole.validation
    assert again.validation["stopped"]
    assert again.steps == whole.steps == whole.validation["best_step"] + 3
    assert looks(tmp_path, "again") == looks(tmp_path, "whole")
    one, other = weights(tmp_path, "whole"), weights(tmp_path, "again")
    assert all(torch.equal(one[n], other[n]) for n in one)
    best = min(looks(tmp_path, "whole").values(), key=lambda look: look["loss"])
    assert best["loss"] == whole.validation["best"]
    # What is left is the best step's: beside the last step's it is other weights.
    train(
        make_recipe(train={"connector": 3.0}, steps=30, schedule="constant", validate=watch | {"keep": "last"}), "last"
    )
    last = weights(tmp_path, "last")
    assert looks(tmp_path, "last") == looks(tmp_path, "whole")
    assert not all(torch.equal(one[n], last[n]) for n in one)
    still = make_recipe(train={"connector": 1e-9}, steps=1, validate={"data": {"path": held}, "every": 1})
    dock = dock_recipe(still)
    dock.load_stage(tmp_path / "whole/stages/0-align")
    train(still, "still", dock=dock)
    assert looks(tmp_path, "still")[1]["loss"] == pytest.approx(best["loss"], rel=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_average_of_the_weights_is_looked_at_and_kept(
    make_recipe: Make, train: Train, held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """`keep: best` with `ema`: what is left is the average of the best step; no other step puts averages in place."""
    shown, own = [0], MasterAdamW.averaged

    def averaged(self: MasterAdamW) -> Any:
        shown[0] += 1
        return own(self)

    monkeypatch.setattr(MasterAdamW, "averaged", averaged)
    watch = {"data": {"path": held}, "every": 5, "keep": "best"}
    options = {"train": {"connector": 3.0}, "steps": 26, "schedule": "constant", "precision": dtype, "ema": 0.5}
    recipe = make_recipe(**options, validate=watch)
    _, whole = train(recipe, "whole")
    assert sorted(looks(tmp_path, "whole")) == [5, 10, 15, 20, 25, 26]
    assert shown == [6]
    train(recipe, "again", stop_at=20)
    _, again = train(recipe, "again", resume=True)
    assert again.validation == whole.validation
    one, other = weights(tmp_path, "whole"), weights(tmp_path, "again")
    assert all(torch.equal(one[n], other[n]) for n in one)
    best = whole.validation["best_step"]
    assert best < 26
    train(make_recipe(**options | {"steps": best}), "best")
    ended = weights(tmp_path, "best")
    assert all(torch.equal(one[n], ended[n]) for n in one)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_held_out_sample_that_goes_bad_is_told(
    make_recipe: Make, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    path = tiny.save_captions(tmp_path / "own", 4)

    def update(self: Progress, line: dict[str, Any]) -> None:
        next(path.parent.glob("*.png")).write_bytes(b"no picture")

    monkeypatch.setattr(Progress, "update", update)
    watch = {"data": {"path": str(path)}, "every": 3}
    options = {"steps": 6, "bad_samples": "skip", "workers": workers, "validate": watch}
    _, result = train(make_recipe(**options))
    assert len(result.skipped) == 1
    assert str(path.parent) in str(result.skipped[0])


@pytest.mark.parametrize(
    "way", [{"accumulate": 2}, {"pack": {"tokens": 120, "window": 8}}, {"pack": 90}, {"cache_features": True}],
    ids=["batches", "planned", "packed", "cached"],
)  # fmt: skip
def test_the_held_out_loss_is_over_tokens_however_they_are_laid_out(
    make_recipe: Make, train: Train, held: str, tmp_path: Path, way: dict[str, Any]
) -> None:
    watch = {"data": [{"path": held}], "every": 1}
    still = {"train": {"connector": 1e-9}, "steps": 1, "validate": watch}
    for name, more in (("plain", {}), ("other", way)):
        raw = make_recipe(**still, **more).model_dump(mode="json")
        raw["model"]["image"]["connector"] = {"type": "mlp", "calibrate": False}  # else by what is seen first
        train(recipes.load(raw), name)
    [plain], [other] = looks(tmp_path, "plain").values(), looks(tmp_path, "other").values()
    assert other["loss"] == pytest.approx(plain["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{}, worlds.FSDP2], ids=["ddp", "fsdp2"])
def test_two_processes_find_one_processs_held_out_loss(
    make_recipe: Make, held: str, tmp_path: Path, engine: dict[str, str]
) -> None:
    watch = {"data": {"path": held}, "every": 2, "keep": "best"}
    recipe = make_recipe(**LORA | {"lora": {"rank": 2}}, steps=4, validate=watch)
    raw = recipe.model_dump(mode="json")
    for processes in (1, 2):
        worlds.trained(processes, raw, tmp_path / str(processes), engine)
    one, two = (looks(tmp_path, f"{n}/run") for n in (1, 2))
    assert sorted(one) == sorted(two) == [2, 4]
    for step, look in one.items():
        assert two[step]["loss"] == pytest.approx(look["loss"], rel=2e-6)
    mine, others = worlds.weights(tmp_path / "1/run"), worlds.weights(tmp_path / "2/run")
    for name, tensor in mine.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_an_entry_of_evaluate_may_be_the_metric(
    language_folder: Callable[..., str], vision_folder: Callable[..., str], tmp_path: Path
) -> None:
    questions = str(tiny.save_questions(tmp_path))
    stage = {
        "name": "align", "train": {"connector": 1e-2}, "data": [{"path": questions}], "batch_size": 2, "steps": 2,
        "validate": {"metric": "asked", "every": 1, "keep": "best"},
    }  # fmt: skip
    encoder = {"type": "hf_vision", "name": vision_folder("clip_vision_model")}
    model = {"language": {"name": language_folder("llama")}, "image": {"encoder": encoder}}
    asked = {"name": "asked", "data": {"path": questions}, "sample": 2, "max_new_tokens": 2}
    recipe = {"precision": "fp32", "model": model, "stages": [stage], "evaluate": [asked], "forgetting": False}
    results = run_recipe(recipes.load(recipe), tmp_path / "run")
    [found] = [s["validation"] for s in results["stages"]]
    assert [look["score"] for look in found["curve"]] == [found["best"]] * 2
    assert found["best_step"] == 1  # the first of equals
    assert "held" not in results
    assert "asked" in (tmp_path / "run" / "card.md").read_text()


def test_a_split_keeps_each_picture_on_one_side(tmp_path: Path) -> None:
    rows = []
    for i in range(60):
        tiny.picture(i % 9, size=8).save(tmp_path / f"{i}.png")
        shown = [f"{i}.png", f"{(i * 7) % 60}.png"][: 1 + i % 2]
        content = [*({"type": "image", "path": name} for name in shown), {"type": "text", "text": f"what is {i}?"}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": "a fox"}]}
        rows.append(json.dumps({"messages": [{"role": "user", "content": content}, answer]}))
    rows += [json.dumps({"messages": [{"role": "user", "content": f"hello {i}"}, answer]}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")

    def pictures(held_out: bool) -> tuple[set[str], list[str]]:
        found = load_examples([DataSpec(path=str(tmp_path / "a.jsonl"))], split=0.3, held_out=held_out)
        samples = [c for conversations, _ in found for c in conversations]
        return {Path(str(i.source)).name for c in samples for i in c.images}, [c.messages[0].text for c in samples]

    learned, trained = pictures(False)
    watched, kept = pictures(True)
    assert watched
    assert not learned & watched
    assert not set(trained) & set(kept)
    assert any(text.startswith("hello") for text in kept)
    assert len(trained) + len(kept) > 60
    assert pictures(True) == (watched, kept)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"every": 1}, "name held-out data"),
        ({"every": 1, "data": {"path": "a"}, "split": 0.1}, "keep one"),
        ({"every": 1, "data": {"path": "a", "repeat": 2}}, "repeat"),
        ({"every": 1, "data": {"path": "a", "streaming": True, "limit": 3}}, "streaming"),
    ],
)
def test_contradictions_are_errors(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ValidateSpec(**given)


def test_an_unknown_metric_names_what_there_is(make_recipe: Make) -> None:
    with refused("recipe", "questions"):
        make_recipe(validate={"every": 1, "metric": "questions"})


def test_a_rising_held_out_loss_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve = [{"step": n, "loss": loss} for n, loss in ((10, 2.0), (20, 1.5), (30, 1.6), (40, 1.7))]
    found = {"metric": "loss", "keep": "last", "curve": curve, "best": 1.5, "best_step": 20, "stopped": False}
    stage = {"name": "s", "steps": 40, "validation": found}
    [(title, text)] = warnings_of({"stages": [stage]})
    assert "ROSE" in title
    assert all(word in text for word in ("step 20", "1.500", "1.700"))
    assert not warnings_of({"stages": [{**stage, "validation": {**found, "curve": curve[:3]}}]})  # one look is chance
    folder = tmp_path / "stages" / "0-s"
    folder.mkdir(parents=True)
    seen = {"validation": {"loss": 1.5, "best_step": 1}}
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, **seen}) + "\n")
    (tmp_path / "results.json").write_text(json.dumps({"stages": [stage]}))
    card = write_card(tmp_path).read_text()
    assert "THE HELD-OUT LOSS ROSE" in card
    assert "held-out loss 1.7, at its best 1.5 in step 20" in card
    from rich.console import Console

    bar = Progress("s", 1, start=0, console=Console(width=200))
    bar.update({"step": 1, "loss": 2.0, "tokens_per_second": 5.0, **seen})
    assert "held out 1.5000" in capsys.readouterr().out
