"""Invariant 4 for two towers: same weights, same logits and loss as transformers' `CLIPModel` and `SiglipModel`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import tiny
from opticnerve.encoders.hf_vision import HFVisionEncoder
from opticnerve.encoders.text import HFTextEncoder
from opticnerve.models.dual_encoder.modeling import DualEncoder
from opticnerve.models.dual_encoder.processing import DualEncoderProcessor
from opticnerve.objectives.contrastive import Negatives, clip_loss, siglip_loss

TEXTS = ["a red circle", "the lazy dog, and a triangle is green", "three of them"]


def save(folder: Path, family: str) -> Any:
    """A tiny random checkpoint with its processor, and the model itself."""
    words = tiny.tokenizer()
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 24, "pad_token_id": words.eos_token_id}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if family == "clip":
        # CLIP reads a text's vector at its first end token: this tokenizer writes none, so one is appended below.
        text |= {"eos_token_id": words.eos_token_id, "bos_token_id": words.eos_token_id}
        model: Any = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    else:
        text |= {"projection_size": 24, "eos_token_id": 0, "bos_token_id": 0}
        model = tf.SiglipModel(tf.SiglipConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.logit_scale.fill_(2.0)
    model.eval().save_pretrained(folder)
    words.pad_token = words.eos_token
    words.save_pretrained(folder)
    tf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def import_dual_encoder(name: str) -> tuple[DualEncoder, DualEncoderProcessor]:
    """A checkpoint of a `CLIPModel` or a `SiglipModel` as a `DualEncoder`: the same weights."""
    whole = tf.AutoModel.from_pretrained(name)
    vision_encoder, reader = HFVisionEncoder.from_pretrained(name), HFTextEncoder.from_pretrained(name)
    model = around(whole, vision_encoder, reader)
    return model, DualEncoderProcessor.of(vision_encoder.image_processor(), reader)


@torch.no_grad()
def around(whole: Any, vision_encoder: HFVisionEncoder, reader: HFTextEncoder) -> DualEncoder:
    """A `DualEncoder` of two loaded towers with the projections and the temperature of a `CLIPModel` or `SiglipModel`.

    SigLIP's towers end in heads of their own, CLIP's in one matrix each.
    """
    clip = whole.config.model_type == "clip"
    model = DualEncoder.from_parts(
        vision_encoder, reader, pooling="pooler", loss="clip" if clip else "siglip",
        projection_dim=whole.config.projection_dim if clip else None, image_projection=clip, text_projection=clip,
    )  # fmt: skip
    named = dict(model.named_parameters())
    if clip:
        named["image.projection.weight"].copy_(whole.visual_projection.weight)
        named["text.projection.weight"].copy_(whole.text_projection.weight)
    else:
        named["logit_bias"].copy_(whole.logit_bias.squeeze())
    named["logit_scale"].copy_(whole.logit_scale.squeeze())
    return model


@pytest.fixture(scope="module", params=["clip", "siglip"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = save(folder, request.param)
    model, processor = import_dual_encoder(str(folder))
    return theirs, model, processor


def inputs(processor: Any, *, count: int = 3) -> dict[str, Any]:
    texts = [t + processor.tokenizer.eos_token for t in TEXTS]
    return dict(processor(images=[tiny.picture(i) for i in range(count)], text=texts, return_tensors="pt"))


def test_logits_loss_and_embeddings_are_theirs(both: tuple[Any, Any, Any]) -> None:
    theirs, ours, processor = both
    batch = inputs(processor)
    with torch.no_grad():
        found, wanted = ours(**batch, return_loss=True), theirs(**batch, return_loss=True)
    assert wanted.logits_per_image.std() > 0.01  # not all alike, or the comparison would say nothing
    for name in ("loss", "logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.get_image_features(batch["pixel_values"]),
            theirs.get_image_features(batch["pixel_values"]).pooler_output,
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip


def test_the_objectives_losses_and_gradients_are_theirs(both: tuple[Any, Any, Any]) -> None:
    theirs, ours, processor = both
    batch = inputs(processor)
    wanted = theirs(**batch, return_loss=True)
    wanted.loss.backward()
    out = ours(**batch)
    scale = ours.logit_scale.exp()
    pairs = Negatives(out.image_embeds, out.text_embeds)
    if ours.config.loss == "clip":
        loss = clip_loss(out.image_embeds, out.text_embeds, scale, pairs)
    else:
        loss = siglip_loss(out.image_embeds, out.text_embeds, scale, ours.logit_bias, pairs)
    (loss / 3).backward()
    torch.testing.assert_close(loss / 3, wanted.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.logit_scale.grad, theirs.logit_scale.grad.squeeze(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        ours.image.encoder.model.encoder.layers[0].mlp.fc1.weight.grad,
        theirs.vision_model.encoder.layers[0].mlp.fc1.weight.grad, rtol=1e-4, atol=1e-6,
    )  # fmt: skip


def test_more_texts_than_pictures_have_logits_but_no_loss(both: tuple[Any, Any, Any]) -> None:
    _, ours, processor = both
    batch = inputs(processor, count=2)
    assert ours(**batch).logits_per_image.shape == (2, 3)
    with pytest.raises(ValueError, match="2 pictures and 3 texts"):
        ours(**batch, return_loss=True)


def test_a_saved_import_comes_back_the_same(both: tuple[Any, Any, Any], tmp_path: Path) -> None:
    _, ours, processor = both
    ours.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = DualEncoder.from_pretrained(tmp_path)
    batch = inputs(type(processor).from_pretrained(tmp_path))
    assert torch.equal(again(**batch).logits_per_image, ours(**batch).logits_per_image)
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in ours.named_parameters()}
