"""Clips through a run: cached and packed as live, foreseen by a plan; and a tiny model that learns when things happen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import made_scenes
import tiny
from opticnerve import recipe as recipes
from opticnerve.language.chat_template import CHATML
from opticnerve.plan import plan
from opticnerve.recipe import Recipe
from opticnerve.runs.pipeline import run_recipe

pytestmark = pytest.mark.usefixtures("private_cache")
FRAMES = {"fps": made_scenes.RATE, "max": made_scenes.FRAMES}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_scenes.save_clips(tmp_path_factory.mktemp("clips"), 12, seed=0)


SAID = ["<0.5 seconds>", "user\nwhen does the square turn red?", "assistant\n"] * 9


@pytest.mark.parametrize("encoder", ["squares", "native"])
def test_cached_and_packed_is_live(
    encoder: str, clips: Path, language_folder: Callable[..., str], vision_folder: Callable[..., str],
    train: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    """Frames in time are kept by their place in time, and a packed row knows whose frames are whose."""
    vision = {"type": "hf_vision", "name": vision_folder()} if encoder == "squares" else tiny.native_vision()
    data = [{"path": str(clips), "frames": FRAMES}]

    def recipe(**stage: Any) -> Recipe:
        chosen = {"name": "align", "train": {"connector": 1e-2}, "data": data, "batch_size": 2, "steps": 3, **stage}
        model = {"language": {"name": language_folder()}, "image": {"encoder": vision}}
        return recipes.load({"precision": "fp32", "model": model, "stages": [chosen]})

    pack = {"pack": {"tokens": 400}}
    train(recipe(**pack), "live")
    train(recipe(**pack, cache_features=True), "cached")
    live, cached = (
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "stages/0-align/metrics.jsonl").read_text().splitlines()
        ]
        for name in ("live", "cached")
    )
    assert cached == pytest.approx(live, rel=1e-5)
    [stage] = plan.make(recipe()).stages
    assert not stage.data.problem and stage.data.media("image") == made_scenes.FRAMES
    assert stage.data.sample is not None and stage.data.length > 2 * made_scenes.FRAMES


@pytest.mark.slow
def test_it_learns_to_tell_when_the_square_turns_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_cache: Path
) -> None:
    """From the words before the frames: which of them is red says no more than a third of it. With the frames of a clip
    in another order it answers by that order, and is wrong."""
    monkeypatch.setitem(tiny.TOKENIZERS, "digits", lambda: tiny.byte_level(corpus=SAID, digits=True))
    language = tiny.save_plain_language(tmp_path / "language", kind="digits", chat_template=CHATML)
    train, test = (made_scenes.save_clips(tmp_path / name, n, seed=n) for name, n in (("train", 300), ("test", 60)))
    recipe = recipes.load(
        {
            "precision": "fp32", "forgetting": False,
            "model": {
                "language": {"name": language},
                "image": {"encoder": {"type": "patches", "image_size": 16, "patch_size": 16}, "connector": {"type": "linear"}},
            },
            "stages": [
                {"name": "all", "train": {"connector": 3e-3, "language": 3e-3}, "data": [{"path": str(train), "frames": FRAMES}],
                 "batch_size": 16, "steps": 180}
            ],
            "evaluate": [{"name": "when", "data": {"path": str(test), "frames": FRAMES}, "image_dependence": 60, "max_new_tokens": 5}],
        }
    )  # fmt: skip
    results = run_recipe(recipe, tmp_path / "run")
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "run/stages/0-all/metrics.jsonl").read_text().splitlines()
    ]
    [task] = results["tasks"]
    found = results["image_dependence"]
    assert losses[-1] < 0.2 * losses[0]
    assert task["accuracy"] > 0.8
    assert found["shuffled_frames"] < 0.3
