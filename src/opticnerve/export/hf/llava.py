"""`hf-llava`: stock transformers' `LlavaForConditionalGeneration`, which vLLM and many others serve, too.

Tensors go under the classic names of the published LLaVA-1.5 checkpoints (`vision_tower.vision_model…`,
`language_model.model…`, `multi_modal_projector…`): transformers 5 and vLLM both load them.
Sources: Liu et al. 2024, Improved Baselines with Visual Instruction Tuning; transformers' `LlavaMultiModalProjector`.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedConfig

from opticnerve.export.hf import common
from opticnerve.export.simplify import connector_matrices, encoder_refusals, fix_picture_size, fold_calibration

if TYPE_CHECKING:
    from opticnerve.encoders.base import Encoder
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.processing import OpticNerveProcessor


class HFLlava(common.HFFormat):
    """CLIP or SigLIP × linear or two-layer mlp × splice, on a decoder with a plain head."""

    model_class = "LlavaForConditionalGeneration"

    def refuse(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> list[str]:
        language = common.decoder_refusals(model, "LLaVA's class")
        return [*encoder_refusals(model, "LLaVA's class"), *_connector_refusals(model), *language]

    def simplify(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> None:
        super().simplify(model, processor)
        fold_calibration(model.image.connector, *connector_matrices(model.image.connector))
        fix_picture_size(model.image.encoder)

    def config(self, model: Any, processor: Any) -> Any:
        encoder, text = model.image.encoder, common.text_config(model, processor)
        vision, layer = copy.deepcopy(encoder.model.config), encoder.layer
        if layer == "last":
            layer = -1
            if vision.model_type == "siglip_vision_model":
                vision.tie_last_hidden_states = True  # hidden_states[-1] is then what stands behind the final norm
        connector = model.image.connector
        config: Any = tf.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=model.config.image_token_id,
            image_seq_length=processor.num_image_tokens, vision_feature_layer=layer,
            projector_hidden_act=connector.options.get("activation", "linear"), multimodal_projector_bias=True,
            vision_feature_select_strategy=_strategy(encoder), tie_word_embeddings=bool(text.tie_word_embeddings),
        )  # fmt: skip
        config.bos_token_id, config.eos_token_id = text.bos_token_id, text.eos_token_id
        config.pad_token_id = processor.tokenizer.pad_token_id
        return config

    def state(self, model: OpticNerveForConditionalGeneration, rows: int) -> dict[str, Tensor]:
        state = common.under("language_model", common.language_state(model.language_model, rows))
        state |= common.under("vision_tower.vision_model", model.image.encoder.model.state_dict())
        first, last = connector_matrices(model.image.connector)
        second: tuple[Any, Any] = (last.weight, last.bias)
        if last is first:
            second = torch.eye(first.out_features), None
        for name, (weight, given) in {"linear_1": (first.weight, first.bias), "linear_2": second}.items():
            bias = torch.zeros(len(weight)) if given is None else given
            state |= common.under(f"multi_modal_projector.{name}", {"weight": weight, "bias": bias})
        return state

    def stock_processor(self, model: OpticNerveForConditionalGeneration, processor: Any) -> Any:
        encoder = model.image.encoder
        return common.placeholders(
            processor, processor.image_processor, encoder.patch_size, encoder.prefix_tokens, _strategy(encoder)
        )

    def notes(self, config: PreTrainedConfig) -> list[str]:
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


def _connector_refusals(model: OpticNerveForConditionalGeneration) -> list[str]:
    options = model.config.towers.get("image", {}).get("connector", {})
    match options.get("type"):
        case None | "linear":
            return []
        case "mlp" if options["depth"] == 2:
            return []
        case "mlp":
            return [f"its mlp has {options['depth']} layers, LLaVA's projector two; nearest: connector {{type: mlp}}"]
        case other:
            return [f"its connector is {other}, LLaVA's projector an mlp; nearest: connector {{type: mlp}}"]


def _strategy(encoder: Encoder) -> Literal["default", "full"]:
    first = encoder.class_token == "drop_first" or (encoder.prefix_tokens and encoder.class_token == "drop")
    return "default" if first else "full"
