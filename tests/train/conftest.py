"""A tiny recipe with its data, and runs that stop when told."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from opticnerve import recipe as recipes
from opticnerve.common.progress import Progress
from opticnerve.models.vlm.build import Dock, dock_recipe
from opticnerve.recipe import Recipe
from opticnerve.train.loop import Interrupted, StageResult, run_stage


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny.save_captions(folder)
    tiny.save_questions(folder)
    return folder


@pytest.fixture
def make_recipe(
    language_folder: Callable[..., str], vision_folder: Callable[..., str], timm_folder: Callable[..., str],
    data: Path, private_cache: Path,
) -> Callable[..., Recipe]:  # fmt: skip
    """Stage options → a recipe of one stage. `vision encoder` is a timm architecture or a vision family, `language model` a language family."""

    def make(
        *,
        vision_encoder: str = "clip_vision_model",
        language_part: str = "llama",
        precision: str = "fp32",
        seed: int = 0,
        **stage: Any,
    ) -> Recipe:
        encoder = (
            {"type": "hf_vision", "name": vision_folder(vision_encoder)} if vision_encoder in tiny.VISION
            else {"type": "timm", "name": timm_folder(vision_encoder), "image_size": 64}
        )  # fmt: skip
        chosen = {
            "name": "align", "train": {"connector": 1e-2}, "data": [{"path": str(data / "captions.jsonl")}],
            "batch_size": 4, "steps": 4, **stage,
        }  # fmt: skip
        model = {"language": {"name": language_folder(language_part)}, "image": {"encoder": encoder}}
        return recipes.load({"seed": seed, "precision": precision, "stages": [chosen], "model": model})

    return make


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Dock, StageResult | None]]:
    """Run the recipe's stage on a fresh dock, as the command does; `stop_at` sends SIGTERM after that step."""

    def run(
        recipe: Recipe,
        folder: str = "run",
        *,
        resume: bool = False,
        stop_at: int | None = None,
        dock: Dock | None = None,
    ) -> tuple[Dock, StageResult | None]:
        made = dock or dock_recipe(recipe)
        with monkeypatch.context() as patch:
            if stop_at is not None:

                def update(self: Progress, line: dict[str, Any]) -> None:
                    if line["step"] == stop_at:
                        signal.raise_signal(signal.SIGTERM)

                patch.setattr(Progress, "update", update)
            place = tmp_path / folder / "stages" / "0-align"
            try:
                return made, run_stage(made, recipe, recipe.stages[0], place, trained_before=set(), resume=resume)
            except Interrupted:
                assert stop_at is not None
                return made, None

    return run


@pytest.fixture
def resumed_exactly(
    train: Callable[..., tuple[Dock, StageResult | None]],
) -> Callable[..., tuple[Dock, StageResult | None]]:
    """Train a recipe's stage in one go (`whole`), and stopped after a step and gone on with (`broken`): the same model
    to the bit. Gives the first, and its result; `opened` makes the docks to train."""

    def run(
        recipe: Recipe, *, stop_at: int = 2, opened: Callable[[Recipe], Dock] = dock_recipe
    ) -> tuple[Dock, StageResult | None]:
        whole, result = train(recipe, "whole", dock=opened(recipe))
        train(recipe, "broken", stop_at=stop_at, dock=opened(recipe))
        again, _ = train(recipe, "broken", resume=True, dock=opened(recipe))
        state = again.model.state_dict()
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(state[name], tensor), name
        return whole, result

    return run
