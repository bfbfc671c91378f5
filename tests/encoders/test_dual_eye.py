"""The vision encoder of a DualEncoder sees the same when it is docked onto a language model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import tiny
from errors import refused
from opticnerve.encoders.nested import DualEncoderVision
from opticnerve.models.dual_encoder.build import dual
from opticnerve.models.dual_encoder.modeling import DualEncoder
from opticnerve.models.vlm.build import Dock, dock

pytestmark = pytest.mark.usefixtures("private_cache")
TYPE = "opticnerve.encoders.nested:DualEncoderVision"


@pytest.fixture(params=["hf_vision", "timm"])
def trained(
    request: pytest.FixtureRequest, bert_folder: str, tmp_path: Path, vision_folder: Callable[..., str],
    timm_folder: Callable[..., str],
) -> tuple[Any, Path]:  # fmt: skip
    """A DualEncoder whose vision encoder has moved, and its folder."""
    name = vision_folder("siglip_vision_model") if request.param == "hf_vision" else timm_folder()
    made = dual({"type": request.param, "name": name}, bert_folder, projection_dim=8)
    with torch.no_grad():
        for parameter in made.model.image.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.model.save_pretrained(tmp_path / "dual")
    made.processor.save_pretrained(tmp_path / "dual")
    return made, tmp_path / "dual"


def test_it_sees_what_the_dual_encoder_sees(trained: tuple[Any, Path]) -> None:
    made, folder = trained
    vision_encoder = DualEncoderVision.from_pretrained(str(folder))
    inner = made.model.image.encoder.eval()
    pixels = torch.randn(2, *vision_encoder.media_shape)
    with torch.no_grad():
        torch.testing.assert_close(vision_encoder(pixels).tokens_BND, inner(pixels).tokens_BND, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(t, inner.state_dict()[n]) for n, t in vision_encoder.inner.state_dict().items())
    assert (vision_encoder.num_tokens, vision_encoder.hidden_size) == (inner.num_tokens, inner.hidden_size)
    assert vision_encoder.image_processor().to_dict() == inner.image_processor().to_dict()
    assert len(vision_encoder.blocks()) == len(inner.blocks())
    assert vision_encoder.weight_files() == [str(folder / "model.safetensors")]
    # Built again from its options, as a configuration does it, and foreseen without weights.
    assert DualEncoderVision(**vision_encoder.options).state_dict().keys() == vision_encoder.state_dict().keys()
    with torch.device("meta"):
        assert DualEncoderVision.planned(str(folder)).num_tokens == vision_encoder.num_tokens


@pytest.mark.parametrize("trained", ["hf_vision"], indirect=True)  # the other has convolutions alone
def test_one_with_an_adapter_is_merged_before(trained: tuple[Any, Path], tmp_path: Path) -> None:
    made, _ = trained
    made.model.give_lora({"rank": 2}, "image.encoder")
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    inner, pixels = made.model.image.encoder.eval(), torch.randn(2, *made.model.image.encoder.media_shape)
    with torch.no_grad():
        wanted = inner(pixels).tokens_BND
    made.model.save_pretrained(tmp_path / "adapted")
    for load in (DualEncoderVision.from_pretrained, DualEncoderVision.planned):
        with refused("unsupported", "image.encoder.lora", "merge_adapters"):
            load(str(tmp_path / "adapted"))
    again = DualEncoder.from_pretrained(tmp_path / "adapted")
    again.merge_adapters()
    again.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        found = DualEncoderVision.from_pretrained(str(tmp_path / "merged"))(pixels).tokens_BND
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_docked_by_one_line_saved_and_loaded(
    trained: tuple[Any, Path], language_folder: Callable[..., str], tmp_path: Path
) -> None:
    made, folder = trained
    docked: Dock = dock({"type": TYPE, "name": str(folder)}, "mlp", language_folder("llama"))
    pixels = docked.processor.image_processor([tiny.picture(1)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = made.model.image.encoder.eval()(pixels).tokens_BND
        torch.testing.assert_close(docked.model.image.encode(pixels).tokens_BND, wanted, rtol=1e-5, atol=1e-5)
    docked.model.save_pretrained(tmp_path / "whole")
    again = type(docked.model).from_pretrained(tmp_path / "whole", trust_remote_code=True)
    with torch.no_grad():
        # (Convolutions round by where their weights lie in memory.)
        torch.testing.assert_close(again.image.encode(pixels).tokens_BND, wanted, rtol=1e-5, atol=1e-5)


def test_a_recipe_may_cut_it_at_another_layer(trained: tuple[Any, Path]) -> None:
    _, folder = trained
    last, earlier = (DualEncoderVision.from_pretrained(str(folder), encoder={"layer": layer}) for layer in ("last", -2))
    pixels = torch.randn(1, *last.media_shape)
    assert last(pixels).tokens_BND.shape != earlier(pixels).tokens_BND.shape or not torch.allclose(
        last(pixels).tokens_BND, earlier(pixels).tokens_BND
    )
    assert earlier.options["encoder"]["layer"] == -2


def test_other_folders_and_broken_weights(trained: tuple[Any, Path], language_folder: Callable[..., str]) -> None:
    _, folder = trained
    with refused("unsupported", "DualEncoder"):
        DualEncoderVision.from_pretrained(language_folder("llama"))
    with refused("unknown-key", "layers", "image_size"):
        DualEncoderVision.from_pretrained(str(folder), encoder={"layers": 1})
    with refused("mismatch", "'patches'"):
        DualEncoderVision.from_pretrained(str(folder), encoder={"type": "patches"})
    file = folder / "model.safetensors"
    state = load_file(file)
    victim = next(n for n in state if n.startswith("image.encoder."))
    del state[victim]
    save_file({**state, "image.encoder.other": torch.zeros(1)}, file, metadata={"format": "pt"})
    with refused("mismatch", victim.removeprefix("image.encoder."), "other"):
        DualEncoderVision.from_pretrained(str(folder))


def test_dual_takes_a_causal_language_model_and_names_its_bases(
    language_folder: Callable[..., str], vision_folder: Callable[..., str]
) -> None:
    vision_encoder = {"type": "hf_vision", "name": vision_folder("vit")}
    made = dual(vision_encoder, {"name": language_folder("llama"), "max_length": 20}, projection_dim=8, loss="siglip")
    assert made.model.text.encoder.pooling == "last"
    assert made.processor.max_length == 20
    assert made.bases["text"]["name"] == language_folder("llama")
    assert all(len(b["sha256"]) == 64 for b in made.bases.values())
    model, processor = made
    batch = processor(images=[tiny.picture(1)], text=["a dog"], return_tensors="pt")
    assert model(**batch).logits_per_image.shape == (1, 1)
    assert isinstance(model, DualEncoder)
    assert json.dumps(model.config.to_dict())
    for bad, refusal in (
        ({"pooling": "mean"}, ("missing-field", "name")),
        ({"name": "x", "pool": "mean"}, ("unknown-key", "pool", "hf_text")),
    ):
        with refused(*refusal):
            dual(vision_encoder, bad)


def test_the_auto_classes_and_a_pipeline_take_the_folder(trained: tuple[Any, Path]) -> None:
    made, folder = trained
    assert type(tf.AutoProcessor.from_pretrained(folder)) is type(made.processor)
    assert isinstance(tf.AutoModel.from_pretrained(folder), DualEncoder)
    classify = tf.pipeline("zero-shot-image-classification", model=str(folder))
    found = classify(tiny.picture(0), candidate_labels=["a dog", "a circle"], hypothesis_template="{}")
    inputs = made.processor(images=tiny.picture(0), text=["a dog", "a circle"], return_tensors="pt")
    with torch.no_grad():
        wanted = made.model.eval()(**inputs).logits_per_image.softmax(1)[0]
    shares = {f["label"]: f["score"] for f in found}
    assert [shares["a dog"], shares["a circle"]] == pytest.approx(wanted.tolist(), abs=1e-4)
