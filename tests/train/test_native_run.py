"""Pictures in their own shape through a run: cached as live, resumed as uninterrupted, two processes as one."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import worlds
from safetensors.torch import load_file

import tiny
from opticnerve import recipe as recipes
from opticnerve.data.check.report import check
from opticnerve.data.dataset.read import DataSource
from opticnerve.data.encode.tokenize import encode
from opticnerve.features import store as feature_cache
from opticnerve.interpret.attribution import attribute
from opticnerve.models.vlm.build import Dock
from opticnerve.plan import plan
from opticnerve.recipe import Recipe
from opticnerve.types import ask

pytestmark = pytest.mark.usefixtures("private_cache")
SIZES = [(30, 90), (100, 40), (33, 31), (16, 200), (64, 64), (8, 8), (50, 20)]


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many shapes, and now and then none."""
    folder, lines = tmp_path_factory.mktemp("shapes"), []
    for i, (height, width) in enumerate(SIZES):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append({"image": f"{i}.png", "caption": ["a red circle", "three lazy foxes", "no"][i % 3]})
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "captions.jsonl"


@pytest.fixture
def recipe(captions: Path, language_folder: Callable[..., str]) -> Callable[..., Recipe]:
    def make(connector: str = "mlp", train: tuple[str, ...] = ("connector",), **stage: Any) -> Recipe:
        encoder = tiny.native_vision(min_patches=4, max_patches=24)
        chosen = {
            "name": "align", "train": dict.fromkeys(train, 1e-2), "data": [{"path": str(captions)}], "batch_size": 4,
            "steps": 4, **stage,
        }  # fmt: skip
        model = {
            "language": {"name": language_folder()},
            "image": {"encoder": encoder, "connector": {"type": connector}},
        }
        return recipes.load({"precision": "fp32", "model": model, "stages": [chosen]})

    return make


def losses(run: Any) -> list[float]:
    folder = run.folder if hasattr(run, "folder") else run
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("connector", ["mlp", "pixel_shuffle"])
def test_the_cache_is_the_live_encoder(
    connector: str, recipe: Callable[..., Recipe], train: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also where a shard holds a few pictures, and rows are packed ahead."""
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 1)
    monkeypatch.setattr(feature_cache, "BATCH", 3)
    stage = {"pack": {"tokens": 96}, "batch_size": 2}
    train(recipe(connector, **stage), "live")
    train(recipe(connector, **stage, cache_features=True), "cached")
    live, cached = (losses(tmp_path / name / "stages" / "0-align") for name in ("live", "cached"))
    assert cached == pytest.approx(live, rel=1e-5)


def test_rows_of_several_shards_come_in_the_order_asked(
    docked: Callable[..., Dock], captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 1)
    monkeypatch.setattr(feature_cache, "BATCH", 3)
    made = docked("llama", tiny.native_vision())
    files: list[Any] = [captions.parent / f"{i}.png" for i in range(len(SIZES))]
    named = [(file, file.name) for file in files]
    prepare, see = made.processor.image_processor, feature_cache.encode_function(made.model)
    assert feature_cache.FeatureStore(tmp_path / "store").fill(named, see, prepare) == len(SIZES)
    store = feature_cache.FeatureStore(tmp_path / "store")
    backwards = files[::-1]
    found = store.rows(backwards, [f.name for f in backwards])
    pixels = prepare([PIL.Image.open(f).convert("RGB") for f in backwards], return_tensors="pt")
    with torch.no_grad():
        live = made.model.image.encode(pixels["pixel_values"], pixels["image_sizes"])
    assert (found.grids, found.mask_BN.tolist()) == (live.grids, live.mask_BN.tolist())
    torch.testing.assert_close(found.tokens_BND[found.mask_BN], live.tokens_BND[live.mask_BN], rtol=1e-5, atol=1e-5)


def test_resumed_is_uninterrupted(recipe: Callable[..., Recipe], train: Callable[..., Any], tmp_path: Path) -> None:
    made = recipe(train=("connector", "encoder", "language.lora"), save_every=1)
    train(made, "whole")
    train(made, "torn", stop_at=2)
    train(made, "torn", resume=True)
    whole, torn = (tmp_path / name / "stages" / "0-align" for name in ("whole", "torn"))
    assert losses(torn) == losses(whole)
    wanted, found = (load_file(next(folder.glob("*.safetensors"))) for folder in (whole, torn))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert any(name.startswith("image.encoder") for name in wanted)


@pytest.mark.slow
def test_two_processes_are_one(recipe: Callable[..., Recipe], captions: Path, tmp_path: Path) -> None:
    """One of them has a batch without a picture now and then."""
    lines = captions.read_text().splitlines()
    words = json.dumps({"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "no"}]})
    mixed = captions.parent / "mixed.jsonl"
    seen = [
        {"role": "user", "content": [{"type": "image", "path": "0.png"}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": "a red circle"},
    ]
    mixed.write_text("\n".join([words] * len(lines) + [json.dumps({"messages": seen})] * 3) + "\n")
    made = recipe(train=("connector", "encoder.last(1)"), data=[{"path": str(mixed)}], batch_size=2, steps=4)
    runs = [worlds.trained(processes, made.model_dump(), tmp_path / str(processes)) for processes in (1, 2)]
    curves = [[line["loss"] for line in worlds.curve(run)] for run in runs]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_a_plan_and_a_check_count_each_picture(
    recipe: Callable[..., Recipe], captions: Path, docked: Callable[..., Dock]
) -> None:
    made = plan.make(recipe("pixel_shuffle"))
    assert made.visual_tokens == 12  # 24 patches in one row become 12
    [stage] = made.stages
    assert not stage.data.problem
    lengths = {len(row) for row in stage.data.rows}
    assert len(lengths) > 2  # as the data is, not as the budget would have it
    assert made.shapes[0].kind == "4 to 24 patches of 8 × 8 pixels"
    assert stage.cache is not None
    processor = docked("llama", tiny.native_vision(min_patches=4, max_patches=24)).processor
    report = check(DataSource(captions).read(), encode=partial(encode, processor=processor))
    assert report.ok
    assert len(report.tokens) > 2


class TestLook:
    @pytest.mark.parametrize("method", ["relevance", "gradient", "attention"])
    @pytest.mark.parametrize(("connector", "shape"), [("mlp", (2, 6)), ("pixel_shuffle", (1, 3))])
    def test_a_map_has_the_picture_s_shape(
        self, method: str, connector: str, shape: tuple[int, int], docked: Callable[..., Dock]
    ) -> None:
        made = docked("llama", tiny.native_vision(), connector=connector)
        wide = PIL.Image.fromarray(np.random.default_rng(5).integers(0, 256, (30, 90, 3), dtype=np.uint8))
        found = attribute(made.model, made.processor, ask("what?", wide), methods=[method], max_new_tokens=4)
        assert found.box == (0, 0, 90, 30)
        assert found.maps[0].grid_WHH.shape[1:] == ((2, 6) if method == "gradient" else shape)
        assert found.maps[1].grid_WHH.shape[1:] == (6, 6)
        assert np.abs(found.maps[1].grid_WHH).max() > 0
