"""Whole CLIP and SigLIP checkpoints of transformers as a `DualEncoder`: the same weights, the same logits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModel

from opticnerve.common import hub
from opticnerve.encoders.hf_vision import HFVisionEncoder
from opticnerve.encoders.text import HFTextEncoder
from opticnerve.models.dual_encoder.modeling import DualEncoder
from opticnerve.models.dual_encoder.processing import DualEncoderProcessor
from opticnerve.types import OpticNerveError


def import_dual_encoder(name: str) -> tuple[DualEncoder, DualEncoderProcessor]:
    """`name`: hub name or local folder of a `CLIPModel` or a `SiglipModel`.

    Raises:
        OpticNerveError: another kind of model, or weights are missing.
    """
    folder = hub.fetch(name)
    with hub.quiet():
        loaded: Any = AutoModel.from_pretrained(folder, output_loading_info=True)
    whole, report = loaded
    if whole.config.model_type not in ("clip", "siglip"):
        raise OpticNerveError(f"{name!r} is a {whole.config.model_type}; only CLIP and SigLIP can be taken over whole")
    if report["missing_keys"] or report["mismatched_keys"]:
        raise OpticNerveError(f"{name!r} lacks weights: {sorted(map(str, report['missing_keys']))[:8]}")
    vision_encoder, reader = HFVisionEncoder.from_pretrained(name), HFTextEncoder.from_pretrained(name)
    model = around(whole, vision_encoder, reader)
    processor = DualEncoderProcessor(
        vision_encoder.image_processor(), reader.tokenizer, max_length=reader.max_length, padding=reader.padding
    )
    return model, processor


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
