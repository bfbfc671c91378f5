"""A checkpoint's own preparation of pictures: pixel by pixel what `AutoImageProcessor` gives, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import transformers as tf
from huggingface_hub.errors import LocalEntryNotFoundError

import tiny
from errors import refused
from opticnerve.common import hub
from opticnerve.encoders.hf_vision import HFVisionEncoder
from opticnerve.encoders.timm import TimmEncoder
from opticnerve.encoders.whisper import WhisperEncoder
from opticnerve.types import OpticNerveError

SQUARE = {"height": 32, "width": 32}
SHORTEST = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
# Vision families, and the processors that their published checkpoints come with.
FAMILIES: dict[str, tuple[str, Any]] = {
    "clip": ("clip_vision_model", tf.CLIPImageProcessor(**SHORTEST)),
    "siglip": ("siglip_vision_model", tf.SiglipImageProcessor(size=SQUARE)),
    "siglip 2": ("siglip_vision_model", tf.SiglipImageProcessor(size=SQUARE, resample=2)),
    "vit": ("vit", tf.ViTImageProcessor(size=SQUARE)),
    "deit": ("vit", tf.DeiTImageProcessor(size={"height": 36, "width": 36}, crop_size=SQUARE)),
    "dinov2": (
        "dinov2", tf.BitImageProcessor(size={"shortest_edge": 37}, crop_size=SQUARE, image_mean=[0.485, 0.456, 0.406])
    ),
    "dinov3": ("dinov3_vit", tf.DINOv3ViTImageProcessor(size=SQUARE)),
    "blip-2": ("blip_2_vision_model", tf.BlipImageProcessor(size=SQUARE)),
    "llava": ("clip_vision_model", tf.LlavaImageProcessor(do_pad=True, **SHORTEST)),
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "not normalised": {"do_normalize": False},
    "not rescaled": {"do_rescale": False},
    "neither": {"do_normalize": False, "do_rescale": False},
    "to ±1": {"rescale_factor": 1 / 127.5},
    "another mean": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.8, 0.7]},
    "bilinear": {"resample": 2},
    "nearest": {"resample": 0},
    "no crop": {"do_center_crop": False},
    "a crop": {"do_center_crop": True, "size": {"shortest_edge": 40}, "crop_size": SQUARE},
    "squashed, then cropped": {"do_center_crop": True, "size": {"height": 40, "width": 40}, "crop_size": SQUARE},
    "another size": {"size": {"height": 24, "width": 24}, "do_center_crop": False},
    "no resize": {"do_resize": False},
    "oblong": {"size": {"height": 24, "width": 32}, "do_center_crop": False},
    "longest edge": {"size": {"longest_edge": 32}, "do_center_crop": False},
    "channels turned": {"do_flip_channel_order": True},
    "any colours": {"do_convert_rgb": False},
}
# No square comes of these, or no colours; padding and resizing in floating point want a plain normalisation.
REFUSED = {"no resize", "oblong", "longest edge", "channels turned", "no crop"}
REFUSED_BY = {
    "llava": {"not normalised", "not rescaled", "neither", "to ±1", "a crop", "squashed, then cropped", "another size"},
    "dinov3": {"not rescaled", "neither", "a crop", "squashed, then cropped"},
}
PICTURES = [
    tiny.picture(1, 32),
    tiny.picture(2, 70),
    tiny.picture(3).resize((90, 50)),
    tiny.picture(4).resize((41, 66)),
]


def checkpoint(folder: Path, family: str) -> Path:
    kind, processor = FAMILIES[family]
    config = tf.AutoConfig.for_model(
        kind,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    torch.manual_seed(0)
    model = tf.Blip2VisionModel if kind == "blip_2_vision_model" else tf.MODEL_MAPPING[type(config)]
    model(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder / "preprocessor_config.json"


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_those_of_the_checkpoint_s_own_processor(family: str, tmp_path: Path) -> None:
    file = checkpoint(tmp_path, family)
    kept = json.loads(file.read_text())
    held = 0
    for what, change in CHANGES.items():
        file.write_text(json.dumps(kept | change))
        own: Any = tf.AutoImageProcessor.from_pretrained(tmp_path)
        try:
            encoder = HFVisionEncoder.planned(str(tmp_path))
        except OpticNerveError as e:
            assert type(own).__name__ in str(e), what
            assert what in REFUSED | REFUSED_BY.get(family, set())
            continue
        held += 1
        wanted = own(PICTURES, return_tensors="pt")["pixel_values"].float()
        found = encoder.image_processor()(PICTURES, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=f"{family}, {what}")
        assert encoder.image_size == wanted.shape[-1]
    assert held >= 7


def test_loaded_and_foreseen_are_prepared_alike(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, "dinov2")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_rescale": False}))
    encoder = HFVisionEncoder.from_pretrained(str(tmp_path))
    assert encoder.options == HFVisionEncoder.planned(str(tmp_path)).options
    again = HFVisionEncoder(**encoder.options)
    assert again.image_processor().to_dict() == encoder.image_processor().to_dict()


@pytest.mark.parametrize("family", ["clip", "siglip", "vit", "dinov2", "dinov3", "blip-2"])
def test_a_missing_file_means_the_family_s_published_values(family: str, tmp_path: Path) -> None:
    file = checkpoint(tmp_path, family)
    said = HFVisionEncoder.planned(str(tmp_path))
    file.unlink()
    found = HFVisionEncoder.planned(str(tmp_path))
    assert found.mean == pytest.approx(said.mean)
    assert (found.image_size, found.fit, found.resample) == (32, said.fit, said.resample)
    if family == "dinov2":
        assert (found.crop_pct, found.std) == (224 / 256, [0.229, 0.224, 0.225])


def test_a_missing_file_where_a_family_has_no_one_way(tmp_path: Path) -> None:
    config = tf.AutoConfig.for_model("vit_mae", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=2, image_size=32, patch_size=8)  # fmt: skip
    tf.ViTMAEModel(config).save_pretrained(tmp_path)
    with refused("missing-file", "vit_mae"):
        HFVisionEncoder.planned(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "", "[]", '{"image_processor_type": "NoneSuch"}', '{"image_mean": 3}'])
def test_a_damaged_file(text: str, tmp_path: Path) -> None:
    file = checkpoint(tmp_path, "clip")
    file.write_text(text)
    for make in (HFVisionEncoder.from_pretrained, HFVisionEncoder.planned):
        with refused("damaged", tmp_path):
            make(str(tmp_path))
        mine = make(str(tmp_path), fit="squash", mean=[0.5] * 3, std=[0.5] * 3)  # who says it all needs no file
        assert list(mine.image_processor().image_mean) == [0.5] * 3


def test_one_file_for_a_whole_processor(tmp_path: Path) -> None:
    """As transformers 5 saves the processors of composite models."""
    file = checkpoint(tmp_path, "siglip")
    said = json.loads(file.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    file.unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": said, "processor_class": "X"}))
    assert HFVisionEncoder.planned(str(tmp_path)).mean == [0.1, 0.2, 0.3]


def test_a_hub_that_is_not_reached_is_no_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("cannot reach it")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(hub.HubError) as e:
        hub.find_file("some/model", "preprocessor_config.json")
    assert e.value.kind in ("network", "offline")


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"crop_pct": 0.8, "interpolation": "bilinear"}, {"fit": "crop", "crop_pct": 0.8, "resample": 2}),
        ({"crop_pct": 1.0, "crop_mode": "squash"}, {"fit": "squash", "crop_pct": 1.0, "resample": 3}),
        ({"crop_pct": 0.9, "crop_mode": "squash"}, {"fit": "squash", "crop_pct": 0.9, "resample": 3}),
    ],
)
def test_timm_s_pretrained_cfg(settings: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    name = tiny.save_timm(tmp_path / "m", "test_vit")
    file = tmp_path / "m" / "config.json"
    said = json.loads(file.read_text())
    said["pretrained_cfg"] |= settings
    file.write_text(json.dumps(said))
    encoder = TimmEncoder.planned(name)
    assert {k: encoder.options[k] for k in options} == options
    picture = tiny.picture(3).resize((400, 300), 2)
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=said["pretrained_cfg"]), is_training=False
    )
    found = encoder.image_processor()([picture], return_tensors="pt")["pixel_values"][0]
    # Pillow's resize and torch's round differently: a grey level and a half of 255, over a deviation of 0.5.
    assert float((found - transform(picture)).abs().max()) <= 3 / 127.5
    assert TimmEncoder.planned(name, fit="squash").crop_pct == 1.0


@pytest.mark.parametrize("settings", [{"crop_mode": "border"}, {"interpolation": "random"}])
def test_what_of_timm_cannot_be_honoured(settings: dict[str, str], tmp_path: Path) -> None:
    name = tiny.save_timm(tmp_path / "m", "test_vit")
    file = tmp_path / "m" / "config.json"
    said = json.loads(file.read_text())
    said["pretrained_cfg"] |= settings
    file.write_text(json.dumps(said))
    with refused("unsupported", next(iter(settings))):
        TimmEncoder.planned(name)


@pytest.mark.filterwarnings("ignore:At least one mel filter")  # of few frequencies, so that it is small
def test_whisper_s_feature_extractor(tmp_path: Path) -> None:
    config = tf.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert WhisperEncoder.planned(str(tmp_path)).seconds == 30
    file = tmp_path / "preprocessor_config.json"
    tf.WhisperFeatureExtractor(chunk_length=10).save_pretrained(tmp_path)
    kept = json.loads(file.read_text())
    assert WhisperEncoder.planned(str(tmp_path)).seconds == 10
    changes = {
        "hop_length": 200,
        "sampling_rate": 8000,
        "n_fft": 512,
        "dither": 0.1,
        "padding_value": 1.0,
        "feature_size": 128,
    }
    for key, value in changes.items():
        file.write_text(json.dumps(kept | {key: value}))
        with refused("unsupported", key):
            WhisperEncoder.planned(str(tmp_path))
    file.write_text("{")
    with refused("damaged", "prepares sound", "preprocessor_config.json"):
        WhisperEncoder.planned(str(tmp_path))
