"""`hf-llava`: stock transformers' `LlavaForConditionalGeneration`, which vLLM and many others serve, too.

Tensors go under the classic names of the published LLaVA-1.5 checkpoints (`vision_tower.vision_model…`,
`language_model.model…`, `multi_modal_projector…`): transformers 5 and vLLM both load them.
Sources: Liu et al. 2024, Improved Baselines with Visual Instruction Tuning; transformers' `LlavaMultiModalProjector`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as tf
from torch import Tensor

from opticnerve.export.clip_like import connector_matrices, encoder_refusals
from opticnerve.export.formats import Format, Proof
from opticnerve.export.hf import common as hf_common
from opticnerve.export.parity import Reference
from opticnerve.export.samples import Sample
from opticnerve.export.simplify import fix_picture_size, fold_calibration
from opticnerve.models.vlm.build import merge_adapter

MODEL = "LlavaForConditionalGeneration"


class HFLlava(Format):
    """CLIP or SigLIP × linear or two-layer mlp × splice, on a decoder with a plain head."""

    def refuse(self, model: Any, processor: Any) -> list[str]:
        language = hf_common.decoder_refusals(model, "LLaVA's class")
        return [*encoder_refusals(model, "LLaVA's class"), *_connector_refusals(model), *language]

    def simplify(self, model: Any, processor: Any) -> None:
        merge_adapter(model)
        tower = model.image
        first, last = connector_matrices(tower.connector)
        fold_calibration(tower.connector, first, last)
        fix_picture_size(tower.encoder)

    def write(self, model: Any, processor: Any, folder: Path) -> list[str]:
        config = _config(model, processor)
        state, theirs = _state(model, rows=config.text_config.vocab_size), _processor(model, processor)
        hf_common.save(folder, model, processor, config=config, state=state, theirs=theirs)
        notes = []
        if config.projector_hidden_act == "linear":
            notes.append(
                "the one matrix of `linear` stands as two (the second is the identity) without activation; "
                "vLLM 0.32 refuses that"
            )
        if getattr(config.vision_config, "tie_last_hidden_states", False):
            notes.append(
                "the vision encoder's last layer is read behind its final norm: config.json says so to transformers 5; "
                "vLLM 0.32 does not read it: take layer: -2 for vLLM"
            )
        return notes

    def check(
        self, folder: Path, model: Any, processor: Any, samples: Sequence[Sample], wanted: Sequence[Reference],
        scratch: Path,
    ) -> Proof:  # fmt: skip
        return hf_common.prove(folder, MODEL, samples, wanted, scratch)


def _connector_refusals(model: Any) -> list[str]:
    options = model.config.towers.get("image", {}).get("connector", {})
    match options.get("type"):
        case "linear":
            return []
        case "mlp" if options["depth"] == 2:
            return []
        case "mlp":
            return [f"its mlp has {options['depth']} layers, LLaVA's projector two; nearest: connector {{type: mlp}}"]
        case None:
            return []
        case other:
            return [f"its connector is {other}, LLaVA's projector an mlp; nearest: connector {{type: mlp}}"]


def _config(model: Any, processor: Any) -> Any:
    encoder, language = model.image.encoder, model.language_model
    text, vision = copy.deepcopy(language.config), copy.deepcopy(encoder.model.config)
    layer = encoder.layer
    if layer == "last":
        layer = -1
        if vision.model_type == "siglip_vision_model":
            vision.tie_last_hidden_states = True  # hidden_states[-1] is then what stands behind the final norm
    text.vocab_size = hf_common.table_rows(model, processor)
    connector = model.image.connector
    config: Any = tf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=model.config.image_token_id,
        image_seq_length=processor.num_image_tokens, vision_feature_layer=layer,
        projector_hidden_act=connector.options.get("activation", "linear"), multimodal_projector_bias=True,
        vision_feature_select_strategy=_strategy(encoder), tie_word_embeddings=bool(text.tie_word_embeddings),
    )  # fmt: skip
    config.bos_token_id, config.eos_token_id = text.bos_token_id, text.eos_token_id
    config.pad_token_id = processor.tokenizer.pad_token_id
    return hf_common.nameless(config, ("text_config", "vision_config"), MODEL, language.dtype)


def _strategy(encoder: Any) -> Literal["default", "full"]:
    return "default" if encoder.prefix_tokens and encoder.class_token == "drop" else "full"


def _state(model: Any, *, rows: int) -> dict[str, Tensor]:
    """Every tensor under its classic name."""
    language, encoder = model.language_model, model.image.encoder
    state = {f"language_model.{n}": t for n, t in hf_common.language_state(language, rows).items()}
    state |= {f"vision_tower.vision_model.{n}": t for n, t in encoder.model.state_dict().items()}
    first, last = connector_matrices(model.image.connector)
    second: tuple[Any, Any] = (last.weight, last.bias) if last is not first else (torch.eye(first.out_features), None)
    for name, (weight, given) in {"linear_1": (first.weight, first.bias), "linear_2": second}.items():
        bias = torch.zeros(len(weight)) if given is None else given
        state |= {f"multi_modal_projector.{name}.weight": weight, f"multi_modal_projector.{name}.bias": bias}
    return hf_common.plain(state, language.dtype)


def _processor(model: Any, processor: Any) -> Any:
    encoder = model.image.encoder
    return tf.LlavaProcessor(
        processor.image_processor, processor.tokenizer, patch_size=encoder.patch_size,
        vision_feature_select_strategy=_strategy(encoder), chat_template=processor.chat_template,
        image_token=processor.image_token, num_additional_image_tokens=encoder.prefix_tokens,
    )  # fmt: skip
