"""Any vision encoder beside any text encoder: pooled as asked, saved and loaded whole, trained in parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from errors import refused
from opticnerve.data.collators.contrastive import PairCollator
from opticnerve.encoders.hf_vision import HFVisionEncoder
from opticnerve.encoders.timm import TimmEncoder
from opticnerve.models.dual_encoder.modeling import DualEncoder
from opticnerve.models.dual_encoder.processing import DualEncoderProcessor
from opticnerve.objectives.contrastive import Contrastive
from opticnerve.types import ask

WORDS = ["red", "blue", "green", "three", "no", "lazy", "quick", "brown"]
THINGS = ["circle", "dog"]
CAPTIONS = [f"a {w} {t}" for w in WORDS for t in THINGS]


def vision_encoder(family: str = "vit", **options: Any) -> HFVisionEncoder:
    torch.manual_seed(4)
    return HFVisionEncoder(architecture=tiny.vision_config(family).to_dict(), **options)


def dual(image: Any = None, text: Any = None, **options: Any) -> tuple[DualEncoder, DualEncoderProcessor]:
    image, text = image or vision_encoder(), text or tiny.text_encoder()
    torch.manual_seed(5)
    model = DualEncoder.from_parts(image, text, **{"projection_dim": 16, **options})
    return model, DualEncoderProcessor(image.image_processor(), text.tokenizer, max_length=text.max_length)


def batch_of(processor: Any, count: int = 4) -> Any:
    talks = [ask("what is it?", tiny.picture(i), answer=CAPTIONS[i]) for i in range(count)]
    return PairCollator(processor)([[t] for t in talks])


# -- pictures -------------------------------------------------------------------------------------------------------


def test_poolings_of_an_eye() -> None:
    pixels = torch.randn(2, 3, 32, 32)
    kept = vision_encoder("clip_vision_model", class_token="keep").eval()
    states = kept.model(pixels)
    for how, wanted in (
        ("mean", states.last_hidden_state.mean(1)),
        ("class_token", states.last_hidden_state[:, 0]),
        ("pooler", states.pooler_output),
    ):
        model, _ = dual(kept, pooling=how)
        torch.testing.assert_close(model.image.encode(pixels), wanted)


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "mobilenetv3_small_050"])
def test_timms_own_pooler_may_change_the_width(name: str) -> None:
    encoder = TimmEncoder(name=name, image_size=None if "vit" in name else 64).eval()
    model, _ = dual(encoder, pooling="pooler")
    pixels = torch.randn(2, *encoder.media_shape)
    wanted = encoder.model.forward_head(encoder.model.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(model.image.encode(pixels), wanted)
    assert model.get_image_features(pixels).shape == (2, 16)


@pytest.mark.parametrize(("make", "pooling", "refusal"), [
    (lambda: vision_encoder("siglip_vision_model", class_token="keep"), "class_token", ("unsupported", "SiglipVisionModel")),
    (lambda: vision_encoder("vit"), "class_token", ("unsupported", "class_token: keep")),
    (lambda: vision_encoder("vit", layer=-2), "pooler", ("conflict", -2)),
    (lambda: vision_encoder("vit"), "max", ("unknown-name", "'max'")),
])  # fmt: skip
def test_impossible_poolings(make: Callable[[], Any], pooling: Any, refusal: tuple[Any, ...]) -> None:
    with refused(*refusal):
        dual(make(), pooling=pooling)


def test_another_size_interpolates_before_the_pooler() -> None:
    model, _ = dual(vision_encoder("siglip_vision_model", image_size=48), pooling="pooler")
    pixels = torch.randn(1, 3, 48, 48)
    wanted = model.image.encoder.model(pixels, interpolate_pos_encoding=True).pooler_output  # type: ignore[operator]
    torch.testing.assert_close(model.image.encode(pixels), wanted)


# -- the whole ------------------------------------------------------------------------------------------------------


def test_towers_without_projections_must_fit() -> None:
    with refused("wrong-shape", 24, 32):
        dual(text=tiny.text_encoder("llama"), image_projection=False, text_projection=False, projection_dim=None)
    model, processor = dual(image_projection=False, text_projection=False, projection_dim=None)
    assert model.embed(batch_of(processor))[0].shape == (4, 24)


def test_projections_are_one_matrix_without_bias() -> None:
    model, processor = dual(text_projection={"bias": True})
    assert [n for n, _ in model.named_parameters() if ".encoder." not in n] == [
        "logit_scale", "image.projection.weight", "text.projection.weight", "text.projection.bias",
    ]  # fmt: skip
    pixels = batch_of(processor).pixel_values
    wanted = model.image.encode(pixels) @ model.image.projection.weight.T
    torch.testing.assert_close(model.get_image_features(pixels), wanted)
    with refused("missing-field", "projection_dim"):
        dual(projection_dim=None)


def test_cached_vectors_stand_in_for_pictures() -> None:
    model, processor = dual()
    batch = batch_of(processor)
    cached = copy.copy(batch)
    cached.pixel_values, cached.image_features = None, model.image.encode(batch.pixel_values)
    assert torch.equal(model.embed(cached)[0], model.embed(batch)[0])
    with pytest.raises(ValueError, match="exactly one"):
        model.get_image_features()


@pytest.mark.parametrize("make", [
    lambda: dual(),
    lambda: dual(TimmEncoder(name="test_efficientnet"), tiny.text_encoder("llama")),
    lambda: dual(TimmEncoder(name="vit_tiny_patch16_224", image_size=32, model_args={"depth": 2, "embed_dim": 24, "num_heads": 2}), pooling="pooler"),
    lambda: dual(vision_encoder("siglip_vision_model"), tiny.text_encoder("siglip_text_model"), pooling="pooler", loss="siglip",
                 projection_dim=None, image_projection=False, text_projection=False),
    lambda: dual(vision_encoder("clip_vision_model", class_token="keep"), tiny.text_encoder("clip_text_model"), pooling="class_token", text_projection={"bias": True}),
])  # fmt: skip
def test_saved_and_loaded_bit_for_bit(make: Callable[[], Any], tmp_path: Path) -> None:
    model, processor = make()
    batch = batch_of(processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = DualEncoder.from_pretrained(tmp_path)
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    batch = batch_of(DualEncoderProcessor.from_pretrained(tmp_path))
    for ours, theirs in zip(model.embed(batch), again.embed(batch), strict=True):
        assert torch.equal(ours, theirs)
    assert again.config.loss == model.config.loss


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    model, _ = dual()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["image.projection.weight"] = torch.zeros(3, 3)
    del state["logit_scale"]
    save_file({**state, "text.other": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with refused("mismatch", "logit_scale") as e:
        DualEncoder.from_pretrained(tmp_path)
    assert "text.other" in str(e.value)
    assert "image.projection.weight" in str(e.value)


def test_half_precision_gives_float32_embeddings() -> None:
    model, processor = dual()
    image, text = model.to(torch.bfloat16).embed(batch_of(processor))
    assert image.dtype == text.dtype == torch.float32
    torch.testing.assert_close(image.norm(dim=1), torch.ones(4))


# -- training -------------------------------------------------------------------------------------------------------


def test_parts_cover_every_parameter_once() -> None:
    model, _ = dual(loss="siglip")
    for part in ("image.encoder", "text.encoder"):
        with refused("unknown-name", f"{part}.lora", "no adapter"):
            model.part_parameters(f"{part}.lora")
        model.give_lora({"rank": 2}, part)
    whole_parts = [p for p in DualEncoder.PARTS if "last" not in p]
    names = [n for part in whole_parts for n in model.part_parameters(part)]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    last = model.part_parameters("text.encoder.last(1)")
    assert last
    assert all(".layer.1." in n for n in last)
    assert model.part_parameters("image.encoder.last(1)").keys() < model.part_parameters("image.encoder").keys()


@pytest.mark.parametrize(("part", "refusal"), [
    ("connector", ("unknown-name", "'connector'", "image.projection")),
    ("text.encoder.last(5)", ("out-of-range", 2)),
])  # fmt: skip
def test_unknown_parts(part: str, refusal: tuple[Any, ...]) -> None:
    with refused(*refusal):
        dual()[0].part_parameters(part)


@pytest.mark.slow
@pytest.mark.parametrize("locked", [False, True], ids=["full", "locked-image"])
def test_sixteen_pairs_are_learned_by_heart(locked: bool) -> None:
    """Sixteen noise pictures find their captions; with a locked vision encoder, no bit of it moves."""
    model, processor = dual()
    batch = batch_of(processor, 16)
    trains = [
        "image.projection",
        "text.projection",
        "text.encoder",
        "temperature",
        *([] if locked else ["image.encoder"]),
    ]
    model.requires_grad_(False)
    parameters = [p for part in trains for p in model.part_parameters(part).values()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    before = {n: t.clone() for n, t in model.image.encoder.state_dict().items()}
    optimizer, objective = torch.optim.AdamW(parameters, lr=3e-3), Contrastive(model)
    for _ in range(60):
        objective.backward([batch], 1 / batch.supervised)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        image, text = model.embed(batch)
    own = torch.arange(16)
    assert torch.equal((image @ text.T).argmax(1), own)
    assert torch.equal((text @ image.T).argmax(1), own)
    moved = [n for n, t in model.image.encoder.state_dict().items() if not torch.equal(t, before[n])]
    assert bool(moved) != locked
