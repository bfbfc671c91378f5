"""What a frozen vision encoder saw: kept by content, exact, whole or not there."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from errors import refused
from opticnerve.data.media.open import open_image
from opticnerve.features import store as feature_cache
from opticnerve.features.store import FeatureStore, encode_function, open_store, see_all
from opticnerve.models.vlm.build import Dock, dock_recipe
from opticnerve.models.vlm.tower import Tower
from opticnerve.recipe import PartSpec, Recipe
from opticnerve.types import DataError

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def pictures(tmp_path: Path) -> list[tuple[Any, str]]:
    for i in range(5):
        tiny.picture(i).save(tmp_path / f"{i}.png")
    return [(tmp_path / f"{i}.png", f"sample {i}") for i in range(5)]


def fill(store: FeatureStore, dock: Any, pictures: list[tuple[Any, str]]) -> int:
    return store.fill(pictures, encode_function(dock.model), dock.processor.image_processor)


def test_rows_are_what_the_eye_sees_in_the_order_asked(
    docked: Callable[..., Dock], pictures: list[tuple[Any, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 1)
    monkeypatch.setattr(feature_cache, "BATCH", 2)
    dock = docked()
    store = FeatureStore(tmp_path / "store")
    assert fill(store, dock, pictures) == 5
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 3
    assert fill(store, dock, pictures) == 0
    backwards = pictures[::-1]
    found = FeatureStore(tmp_path / "store").rows([s for s, _ in backwards], [w for _, w in backwards])
    pixels = dock.processor.image_processor([open_image(s) for s, _ in backwards], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        live = dock.model.image.encode(pixels)
    assert found.tokens_BND.dtype == live.tokens_BND.dtype
    torch.testing.assert_close(found.tokens_BND, live.tokens_BND, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.mask_BN, live.mask_BN)


def test_content_counts_not_the_name(
    docked: Callable[..., Dock], pictures: list[tuple[Any, str]], tmp_path: Path
) -> None:
    store = FeatureStore(tmp_path / "store")
    copy = tmp_path / "copy.png"
    copy.write_bytes(pictures[0][0].read_bytes())
    assert fill(store, docked(), [pictures[0], (copy, "the copy")]) == 1
    assert torch.equal(store.rows([copy], ["x"]).tokens_BND, store.rows([pictures[0][0]], ["x"]).tokens_BND)
    with refused("unreadable-image", "sample 1", store.folder, error=DataError):
        store.rows([pictures[1][0]], ["sample 1"])


def test_other_weights_or_another_size_are_another_store(docked: Callable[..., Dock]) -> None:
    dock = docked()
    first = open_store(dock.model, dock.processor).folder
    assert open_store(dock.model, dock.processor).folder == first
    with torch.no_grad():
        next(dock.model.image.encoder.parameters()).add_(1e-3)
    assert open_store(dock.model, dock.processor).folder != first


def test_a_torn_shard_is_an_error_and_a_half_written_one_is_not_seen(
    docked: Callable[..., Dock], pictures: list[tuple[Any, str]], tmp_path: Path
) -> None:
    folder = tmp_path / "store"
    fill(FeatureStore(folder), docked(), pictures)
    (folder / ".abc-1.partial").write_bytes(b"half")
    assert len(FeatureStore(folder)) == 5
    [shard] = folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:20])
    with refused("damaged", shard):
        FeatureStore(folder)


def test_a_store_travels_to_workers(
    docked: Callable[..., Dock], pictures: list[tuple[Any, str]], tmp_path: Path
) -> None:
    store = FeatureStore(tmp_path / "store")
    fill(store, docked(), pictures)
    source, where = pictures[2]
    kept = store.rows([source], [where])
    there = pickle.loads(pickle.dumps(store)).rows([source], [where])
    assert torch.equal(there.tokens_BND, kept.tokens_BND)


@pytest.mark.parametrize("fusion", ["splice", "cross_attention"])
def test_a_docked_model_trains_the_same_on_the_cache(
    fusion: str, make_recipe: Callable[..., Recipe], train: Callable[..., Any], tmp_path: Path
) -> None:
    def curve(name: str, **stage: Any) -> list[float]:
        recipe = make_recipe(**stage)
        tower = recipe.docked.image.model_copy(update={"fusion": recipe.docked.image.fusion.model_copy(update={"type": fusion})})  # fmt: skip
        recipe = recipe.model_copy(update={"model": recipe.docked.model_copy(update={"image": tower})})
        train(recipe, name)
        lines = (tmp_path / name / "stages" / "0-align" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    assert curve("cached", cache_features=True) == pytest.approx(curve("live"), rel=1e-5)


def test_see_all_leaves_the_eye_as_it_was(docked: Callable[..., Dock], pictures: list[tuple[Any, str]]) -> None:
    dock = docked()
    dock.model.image.encoder.train()
    store = see_all(dock.model, dock.processor, pictures)
    assert dock.model.image.encoder.training
    assert len(store) >= 5


def test_one_store_serves_every_connector_and_recipe(
    make_recipe: Callable[..., Recipe], train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen once: not again in later epochs, by another connector, or in another recipe."""
    looked: list[int] = []
    encode = Tower.encode

    def count(self: Tower, media: torch.Tensor) -> Any:
        looked.append(len(media))
        return encode(self, media)

    monkeypatch.setattr(Tower, "encode", count)
    recipe = make_recipe(cache_features=True, epochs=3, steps=None, seed=7)
    with torch.no_grad():
        vision_encoder = dock_recipe(recipe)
        next(vision_encoder.model.image.encoder.parameters()).mul_(1.01)  # one that no other test has shown pictures to
    state = vision_encoder.model.image.encoder.state_dict()

    def run(name: str, recipe: Recipe) -> int:
        looked.clear()
        dock = dock_recipe(recipe)
        dock.model.image.encoder.load_state_dict(state)
        train(recipe, name, dock=dock)
        return sum(looked)

    assert run("first", recipe) == 6
    assert recipe.docked.image is not None
    other = recipe.docked.image.model_copy(update={"connector": PartSpec(type="linear")})
    swept = recipe.model_copy(update={"model": recipe.docked.model_copy(update={"image": other})})
    assert run("another connector", swept) == 0
    assert (
        run(
            "another recipe",
            make_recipe(cache_features=True, steps=2, language_part="qwen2", train={"connector": 1e-3}),
        )
        == 0
    )


def test_half_size_features_have_a_store_of_their_own(
    docked: Callable[..., Dock], pictures: list[tuple[Any, str]], tmp_path: Path
) -> None:
    dock = docked()  # a float32 vision encoder
    exact = see_all(dock.model, dock.processor, pictures)
    half = see_all(dock.model, dock.processor, pictures, stored="bfloat16")
    assert half.folder != exact.folder
    sources, where = zip(*pictures, strict=True)
    found, wanted = half.rows(sources, where).tokens_BND, exact.rows(sources, where).tokens_BND
    assert found.dtype == wanted.dtype == torch.float32
    assert torch.equal(found, wanted.bfloat16().float())
    assert open_store(dock.model, dock.processor, stored="float32").folder == exact.folder


def test_processes_share_what_is_to_be_seen(docked: Callable[..., Dock], pictures: list[tuple[Any, str]]) -> None:
    """Whoever waits for the others finds their share; without a common disk it sees that, too."""
    dock = docked()
    with torch.no_grad():
        next(dock.model.image.encoder.parameters()).mul_(0.99)

    def other() -> None:
        store = open_store(dock.model, dock.processor)
        fill(store, dock, pictures)

    store = see_all(dock.model, dock.processor, pictures, rank=0, world=2, wait=other)
    assert len(store) == 5
    with torch.no_grad():
        next(dock.model.image.encoder.parameters()).mul_(0.99)
    assert len(see_all(dock.model, dock.processor, pictures, rank=1, world=2, wait=lambda: None)) == 5
