"""Whether a cache of features pays is foreseen from arithmetic and bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from opticnerve import recipe as recipes
from opticnerve.features.budget import BUDGET
from opticnerve.features.store import see_all
from opticnerve.models.vlm.build import dock_recipe
from opticnerve.plan import feature_cache, plan
from opticnerve.plan import model as plan_model
from opticnerve.plan.feature_cache import CachePlan
from opticnerve.recipe import Recipe
from opticnerve.train.sampler import StageSampler


@pytest.fixture
def make_recipe(
    tmp_path: Path, language_folder: Callable[..., str], vision_folder: Callable[..., str], private_cache: Path
) -> Callable[..., Recipe]:
    captions = tiny.save_captions(tmp_path, 6)

    def make(precision: str = "fp32", **stage: Any) -> Recipe:
        given = {
            "name": "align", "train": {"connector": 1e-3}, "data": [{"path": str(captions)}], "batch_size": 3,
            "epochs": 50, **stage,
        }  # fmt: skip
        vision_encoder = {"type": "hf_vision", "name": vision_folder()}
        model = {"language": {"name": language_folder()}, "image": {"encoder": vision_encoder}}
        return recipes.load({"precision": precision, "model": model, "stages": [given]})

    return make


def foreseen(recipe: Recipe) -> CachePlan:
    found = plan.make(recipe).stages[0].cache
    assert found is not None
    return found


def test_disk_and_views_are_the_real_ones(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe()
    found = foreseen(recipe)
    dock = dock_recipe(recipe)
    from opticnerve.data.dataset.load import load_examples

    sampler = StageSampler(load_examples(recipe.stages[0].data), recipe.stages[0], dock.processor, seed=0)
    assert (found.views, found.pictures) == (sampler.steps * 3, len(sampler.pictures())) == (300, 6)
    store = see_all(dock.model, dock.processor, sampler.pictures())
    kept = store.rows(*zip(*sampler.pictures(), strict=True))
    assert found.disk == kept.tokens_BND.nbytes + kept.mask_BN.nbytes
    assert foreseen(make_recipe("bf16")).disk == kept.tokens_BND.nbytes // 2 + kept.mask_BN.nbytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache, "_DISK", 1e30)
        free = foreseen(recipe)
    assert free.saved == pytest.approx(free.vision_encoder * (1 - 6 / 300))
    # The whole step is the vision encoder and the rest; the vision encoder's share is a share.
    assert 0 < free.vision_encoder < 1


def test_the_eye_s_share_is_what_the_step_lacks_without_it(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    found = plan.make(recipe).stages[0]
    vision_encoder = plan_model.meta_model(recipe).towers["image"].encoder
    flops = torch.utils.flop_counter.FlopCounterMode(display=False)
    with torch.device("meta"), flops:
        vision_encoder(torch.empty(3, *vision_encoder.media_shape))
    assert found.cache is not None
    assert found.cache.vision_encoder == pytest.approx(flops.get_total_flops() / found.flops, rel=1e-6)


def test_no_cache_is_foreseen_where_there_can_be_none(make_recipe: Callable[..., Recipe]) -> None:
    for train in ({"connector": 1e-3, "encoder": 1e-5}, {"connector": 1e-3, "image.encoder.last(1)": 1e-5}):
        assert plan.make(make_recipe(train=train)).stages[0].cache is None
    assert plan.make(make_recipe(data=[{"path": "missing.jsonl"}])).stages[0].cache is None


def test_a_short_stage_caches_only_what_it_sees(make_recipe: Callable[..., Recipe]) -> None:
    found = foreseen(make_recipe(steps=1, epochs=None))
    assert (found.views, found.pictures) == (3, 3)
    assert "hardly a picture is seen twice" in found.remark()[1]


def test_the_words(make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    def words(**changes: Any) -> tuple[bool, str]:
        given = {
            "on": False, "views": 300, "pictures": 100, "vision_encoder": 0.6, "saved": 0.4, "seconds": 720.0,
            "disk": 1_200_000_000, "budget": 20_000_000_000, "free": 10**12, "halves": True,
        }  # fmt: skip
        return CachePlan(**{**given, **changes}).remark()

    assert words() == (False, "cache_features would save about 40% of this stage's time (12 min) for 1.2 GB of disk")
    assert words(on=True)[1].startswith("cache_features saves about 40%")
    assert words(vision_encoder=0.02, saved=0.01)[1].startswith("cache_features does not pay: the image encoder is 2%")
    decide, text = words(on=True, budget=10**9)
    assert decide
    assert "needs 1.2 GB of disk; 1 GB are allowed" in text
    assert "bfloat16" in text
    decide, text = words(budget=10**9, halves=False)
    assert not decide
    assert "would save" in text
    assert "bfloat16" not in text

    # In the plan: a warning where it would not fit, a note else; the time is that of the cached stage.
    monkeypatch.setenv(BUDGET, "1kB")
    made = plan.make(make_recipe(cache_features=True))
    assert [r.level for r in made.remarks if "cache_features needs" in r.text] == ["warning"]
    monkeypatch.delenv(BUDGET)
    monkeypatch.setattr(feature_cache, "_DISK", 1e30)
    live, cached = (plan.make(make_recipe(cache_features=on)) for on in (False, True))
    assert [r.level for r in live.remarks if "cache_features would save" in r.text] == ["note"]
    assert [r.level for r in cached.remarks if "cache_features saves" in r.text] == ["note"]
    told = json.loads(json.dumps(cached.to_dict()))["stages"][0]
    assert told["cache_features"]["pays"] is True
    assert told["timing"].endswith("with cache_features")


def test_rows_packed_ahead_are_foreseen(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    packed = recipe.stages[0].model_copy(update={"pack": SimpleNamespace(tokens=100, window=6)})
    apart, together = (
        plan.make(recipe.model_copy(update={"stages": [s]})).stages[0] for s in (recipe.stages[0], packed)
    )
    assert together.data.per_row > 1.5
    assert together.data.steps < apart.data.steps
    assert together.epochs == pytest.approx(50, rel=0.05)
    assert together.data.length > 1.5 * apart.data.length
    assert together.cache.views == pytest.approx(apart.cache.views, rel=0.05)
