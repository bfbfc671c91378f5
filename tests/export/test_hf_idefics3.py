"""`hf-idefics3`: what comes out, what is refused, and that stock transformers answers as the model does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import tiny
from errors import refused
from opticnerve.export.export import export
from opticnerve.export.hf import idefics3

pytestmark = pytest.mark.usefixtures("private_cache")
Make = Callable[..., Path]
SHUFFLE = {"vision_encoder": "siglip_vision_model", "connector": "pixel_shuffle", "fit": "squash"}


def test_auto_classes_load_it_without_opticnerve_and_answer_alike(saved: Make, tmp_path: Path) -> None:
    """The whole way: bfloat16, an adapter, a calibration, a process of its own; then a batch through the Auto classes."""
    source = saved("llama", **SHUFFLE, lora={"rank": 4}, dtype=torch.bfloat16)
    made = export(source, "hf-idefics3", tmp_path / "out")
    assert made.proof is not None
    assert made.proof.engine == f"transformers {tf.__version__}"
    assert made.proof.samples == 5
    assert made.proof.difference <= 1e-5
    model = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "Idefics3ForConditionalGeneration"
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "out")
    word = processor.image_token
    both = processor(
        images=[[tiny.picture(0)], [tiny.picture(1), tiny.picture(2)]], text=[word, word + word], padding=True,
        return_tensors="pt",
    )  # fmt: skip
    assert both["pixel_values"].shape == (3, 1, 3, 32, 32)
    assert (both["input_ids"] == processor.image_token_id).sum(1).tolist() == [4, 8]
    assert model(**both).logits.isfinite().all()


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    "options",
    [
        {"family": "qwen2", "image_size": 48},
        {"family": "llama tied", "connector": {"type": "pixel_shuffle", "scale": 4}},
        {"family": "mistral", "vision_encoder": "idefics3_vision"},
        {"family": "llama", "vision_encoder": "idefics3_vision", "image_size": 64},
    ],
)
def test_other_families_sizes_and_scales(options: dict[str, Any], saved: Make, tmp_path: Path) -> None:
    made = export(saved(**{**SHUFFLE, **options}), "hf-idefics3", tmp_path / "out")
    assert made.proof is not None
    assert made.proof.difference <= 1e-5


def test_what_was_exported_is_imported_again(saved: Make, comes_back: Callable[..., None]) -> None:
    """Its pictures are squares without words around them, unlike Idefics3's own."""
    comes_back(saved("qwen2", **SHUFFLE), "hf-idefics3", tiny.picture(1, 90).resize((90, 30)), atol=1e-4)


@pytest.mark.usefixtures("in_this_process")
def test_a_matrix_whose_columns_are_out_of_order_is_caught(
    saved: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = idefics3.HFIdefics3.state

    def swapped(*args: Any) -> dict[str, Any]:
        state = honest(*args)
        name = "model.connector.modality_projection.proj.weight"
        return {**state, name: state[name].roll(24, 1)}

    monkeypatch.setattr(idefics3.HFIdefics3, "state", swapped)
    with refused("mismatch", "sample 2 in transformers", "logits"):
        export(saved("llama", **SHUFFLE), "hf-idefics3", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"connector": "mlp"}, ["its connector is mlp"]),
        ({"connector": {"type": "pixel_shuffle", "depth": 2}}, ["its pixel_shuffle has depth 2"]),
        ({"layer": -2}, ["its vision encoder is read at layer -2"]),
        ({"fit": "crop"}, ["fit: crop"]),
        ({"image_size": 8 * 40, "connector": {"type": "pixel_shuffle", "scale": 8}}, ["40 × 40 patches", "image_size: 312"]),
        ({"vision_encoder": "clip_vision_model"}, ["its vision encoder is a clip_vision_model"]),
        ({"lora": {"rank": 2, "when": "media"}}, ["lora.when: media"]),
        ({"family": "gemma2"}, ["final_logit_softcapping"]),
    ],
)  # fmt: skip
def test_what_idefics3_cannot_hold_is_refused_with_a_way_out(
    options: dict[str, Any], facts: list[str], saved: Make, tmp_path: Path
) -> None:
    with refused("unsupported", *facts, "nearest"):
        export(saved(**{**SHUFFLE, **options}), "hf-idefics3", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_places_are_counted_as_idefics3s_own_embeddings_count_them() -> None:
    """For a table that holds each place's number, the embeddings of a blank picture are those numbers."""
    for side in (4, 16, 19, 27, 40):
        config = tf.Idefics3VisionConfig(hidden_size=1, num_attention_heads=1, image_size=side, patch_size=1)
        table = tf.models.idefics3.modeling_idefics3.Idefics3VisionEmbeddings(config)
        with torch.no_grad():
            table.patch_embedding.weight.zero_()
            table.patch_embedding.bias.zero_()
            table.position_embedding.weight.copy_(torch.arange(side**2.0)[:, None])
            found = table(torch.zeros(1, 3, side, side), torch.ones(1, side, side, dtype=torch.bool))
        same = torch.equal(found.flatten(), torch.arange(side**2.0))
        assert idefics3._counts_places(side) is same


@pytest.mark.usefixtures("in_this_process")
def test_the_folder_says_what_it_is(saved: Make, tmp_path: Path) -> None:
    export(saved("llama", **SHUFFLE), "hf-idefics3", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "idefics3"
    assert config["scale_factor"] == 2
    assert json.loads((tmp_path / "out/processor_config.json").read_text())["processor_class"] == "LlavaProcessor"
