"""Vision encoders against the models that they wrap: a picture through our preparation and our encoder gives what it
gives through the checkpoint's own image processor and the bare model. fp32, at most 1e-5 apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from torch import Tensor

import tiny
from opticnerve.encoders.hf_vision import HFVisionEncoder
from opticnerve.encoders.nested import PairEncoder
from opticnerve.encoders.timm import TimmEncoder

SIDE, PATCH = 32, 8
SQUARE = {"height": SIDE, "width": SIDE}
SMALL = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES = {"image_size": SIDE, "patch_size": PATCH}


@dataclass(frozen=True)
class Family:
    """A vision model of transformers, its own image processor, and how many class and register tokens it has."""

    model: Any
    processor: Any
    prefix: int = 0
    config: dict[str, Any] = field(default_factory=lambda: SIZES)
    any_shape: bool = True  # whether the processor makes a square of any picture, as ours does


FAMILIES = {
    "clip": Family(
        tf.CLIPVisionModel, lambda: tf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE), prefix=1
    ),
    "siglip": Family(tf.SiglipVisionModel, lambda: tf.SiglipImageProcessor(size=SQUARE)),
    "siglip 2": Family(
        tf.Siglip2VisionModel,
        lambda: tf.Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=16),
        config={"patch_size": PATCH, "num_patches": 16},
        any_shape=False,  # its pictures keep their aspect ratio
    ),
    "dinov2": Family(
        tf.Dinov2Model, lambda: tf.BitImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE), prefix=1
    ),
    "dinov2 with registers": Family(
        tf.Dinov2WithRegistersModel,
        lambda: tf.BitImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE),
        prefix=4,
        config={**SIZES, "num_register_tokens": 3},
    ),
    "dinov3": Family(
        tf.DINOv3ViTModel,
        lambda: tf.DINOv3ViTImageProcessor(size=SQUARE),
        prefix=3,
        config={**SIZES, "num_register_tokens": 2},
    ),
    "vit": Family(tf.ViTModel, lambda: tf.ViTImageProcessor(size=SQUARE), prefix=1),
    "blip-2": Family(tf.Blip2VisionModel, lambda: tf.BlipImageProcessor(size=SQUARE), prefix=1),
    "instructblip": Family(tf.InstructBlipVisionModel, lambda: tf.BlipImageProcessor(size=SQUARE), prefix=1),
}


def save(folder: Path, family: Family, *, seed: int = 0) -> str:
    """A checkpoint with random weights, all of them off their neutral start, and its processor."""
    torch.manual_seed(seed)
    model = family.model(family.model.config_class(**SMALL, **family.config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    family.processor().save_pretrained(folder)
    return str(folder)


def bare(folder: str, family: Family, pictures: list[Any], **options: Any) -> Any:
    """What the checkpoint gives by transformers alone."""
    model = family.model.from_pretrained(folder).eval()
    processor: Any = tf.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        return model(**processor(pictures, return_tensors="pt"), **options)


def ours(encoder: Any, pictures: list[Any]) -> Tensor:
    pixels = encoder.image_processor()(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return encoder.eval()(pixels).tokens_BND


def apart(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


def pictures_for(family: Family) -> list[Any]:
    square = [tiny.picture(1, SIDE), tiny.picture(2, SIDE)]
    return [*square, tiny.picture(3, 70), tiny.picture(4).resize((90, 50))] if family.any_shape else square


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layer", ["last", -2])
@pytest.mark.parametrize("class_token", ["drop", "keep"])
def test_the_bare_model_behind_its_own_processor(name: str, layer: Any, class_token: Any, tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = save(tmp_path, family)
    encoder = HFVisionEncoder.from_pretrained(folder, layer=layer, class_token=class_token)
    pictures = pictures_for(family)
    out = bare(folder, family, pictures, output_hidden_states=True)
    wanted = (out.last_hidden_state if layer == "last" else out.hidden_states[layer])[
        :, family.prefix if class_token == "drop" else 0 :
    ]
    found = ours(encoder, pictures)
    assert apart(found, wanted) <= 1e-5
    assert found.shape[1:] == (encoder.num_tokens, encoder.hidden_size)
    assert encoder.num_tokens == 16 + (family.prefix if class_token == "keep" else 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_picture_matters(name: str, tmp_path: Path) -> None:
    """Were the two sides blind, they would agree as well."""
    encoder = HFVisionEncoder.from_pretrained(save(tmp_path, FAMILIES[name]))
    one, other = ours(encoder, [tiny.picture(1, SIDE), tiny.picture(2, SIDE)])
    assert apart(one, other) > 1e-2


@pytest.mark.parametrize("side", [24, 48])
def test_siglip_2_at_another_size(side: int, tmp_path: Path) -> None:
    """The processor is told of as many patches as our square has; the model resamples its positions."""
    family = FAMILIES["siglip 2"]
    folder = save(tmp_path, family)
    picture = [tiny.picture(1, side)]
    processor = tf.Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=(side // PATCH) ** 2)
    with torch.no_grad():
        out = family.model.from_pretrained(folder).eval()(**processor(picture, return_tensors="pt"))
    assert apart(ours(HFVisionEncoder.from_pretrained(folder, image_size=side), picture), out.last_hidden_state) <= 1e-5


@pytest.mark.parametrize("tower", ["idefics3", "smolvlm"])
def test_idefics3_s_and_smolvlm_s_eye(tower: str, tmp_path: Path) -> None:
    """Their processors cut a picture into squares and normalise those; one such square is compared."""
    made: Any = {"idefics3": tf.Idefics3ForConditionalGeneration, "smolvlm": tf.SmolVLMForConditionalGeneration}[tower]
    text = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 40}  # fmt: skip
    torch.manual_seed(0)
    config = made.config_class(vision_config={**SMALL, **SIZES}, text_config=text, scale_factor=2)
    whole = made(config).eval()
    whole.save_pretrained(tmp_path)
    tf.Idefics3ImageProcessor(do_image_splitting=False).save_pretrained(tmp_path)
    encoder = HFVisionEncoder.from_pretrained(str(tmp_path))
    pixels = encoder.image_processor()([tiny.picture(1, SIDE)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = whole.model.vision_model(pixels).last_hidden_state
        assert apart(encoder.eval()(pixels).tokens_BND, wanted) <= 1e-5
    theirs = tf.Idefics3ImageProcessor.from_pretrained(tmp_path)
    assert (encoder.mean, encoder.std) == (list(theirs.image_mean), list(theirs.image_std))
    assert encoder.resample == int(theirs.resample)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_timm_behind_its_own_transform(name: str) -> None:
    encoder = TimmEncoder(name=name, image_size=64).eval()
    model = timm.create_model(name, pretrained=False, **({"img_size": 64} if "vit" in name else {})).eval()
    model.load_state_dict(encoder.model.state_dict())
    settings = {**timm.data.resolve_model_data_config(model), "input_size": (3, 64, 64), "crop_pct": 1.0}
    transform = timm.data.create_transform(**settings, is_training=False)
    picture = tiny.picture(1, 64)
    with torch.no_grad():
        wanted = model.forward_features(transform(picture)[None])
    wanted = wanted.flatten(2).transpose(1, 2) if wanted.ndim == 4 else wanted[:, model.num_prefix_tokens :]
    assert apart(ours(encoder, [picture]), wanted) <= 1e-5


@pytest.mark.parametrize("join", ["channels", "tokens"])
def test_both_halves_of_a_pair(join: Any, tmp_path: Path) -> None:
    """SigLIP and DINOv2 side by side: each half is the bare model's behind its own processor, though the pixels were
    prepared for the first alone."""
    families = FAMILIES["siglip"], FAMILIES["dinov2"]
    folders = [save(tmp_path / str(i), family, seed=i) for i, family in enumerate(families)]
    first, second = ({"type": "hf_vision", "name": folder} for folder in folders)
    names, options = PairEncoder.take_name({"first": first, "second": second, "join": join})
    encoder = PairEncoder.from_pretrained(names, **options)
    assert encoder.first.image_processor().image_mean != encoder.second.image_processor().image_mean
    picture = [tiny.picture(5, SIDE), tiny.picture(6, SIDE)]
    found = ours(encoder, picture)
    halves = found.split(24, dim=2) if join == "channels" else found.split(16, dim=1)
    for half, folder, family in zip(halves, folders, families, strict=True):
        assert apart(half, bare(folder, family, picture).last_hidden_state[:, family.prefix :]) <= 1e-5
