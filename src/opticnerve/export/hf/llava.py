"""`hf-llava`: stock transformers' `LlavaForConditionalGeneration`, which vLLM and many others serve, too.

Tensors go under the classic names of the published LLaVA-1.5 checkpoints (`vision_tower.vision_model…`,
`language_model.model…`, `multi_modal_projector…`): transformers 5 and vLLM both load them.

A Pixtral is the one vision encoder that this class shows pictures in their own shape, as mistral-community/pixtral-12b
has it. Its processor writes a word behind each row of patches and one behind each picture; both are told to be empty.
Sources: Liu et al. 2024, Improved Baselines with Visual Instruction Tuning; Agrawal et al. 2024, Pixtral 12B;
transformers' `LlavaMultiModalProjector`, `PixtralProcessor`.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedConfig

from opticnerve.encoders.native import cut_patches
from opticnerve.export.hf import common
from opticnerve.export.simplify import (
    VISION_ENCODERS,
    connector_matrices,
    encoder_refusals,
    fix_picture_size,
    fold_calibration,
)

if TYPE_CHECKING:
    from opticnerve.encoders.base import Encoder
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.processing import OpticNerveProcessor


class HFLlava(common.HFFormat):
    """CLIP, SigLIP or Pixtral × linear or two-layer mlp × splice, on a decoder with a plain head."""

    model_class = "LlavaForConditionalGeneration"
    config_class: ClassVar[Any] = tf.LlavaConfig
    engine = "LLaVA's class"
    native = "pixtral"
    tiles = False
    _patch_size = 0  # of the model that was written

    def refuse(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> list[str]:
        language = common.decoder_refusals(model, self.engine)
        known = (*VISION_ENCODERS, *filter(None, [self.native]))
        seen = encoder_refusals(model, self.engine, known, native=self.native, tiles=self.tiles)
        return [*(seen or self.picture_refusals(model)), *_connector_refusals(model), *language]

    def picture_refusals(self, model: OpticNerveForConditionalGeneration) -> list[str]:
        """Why pictures are shown otherwise than the class's own processor shows them."""
        return _budget_refusals(model.image.encoder)

    def config_options(self, model: OpticNerveForConditionalGeneration) -> dict[str, Any]:
        """What the class's configuration has beyond LLaVA's."""
        return {}

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
        config: Any = self.config_class(
            vision_config=vision, text_config=text, image_token_index=model.config.image_token_id,
            image_seq_length=processor.num_image_tokens, vision_feature_layer=layer,
            projector_hidden_act=connector.options.get("activation", "linear"), multimodal_projector_bias=True,
            vision_feature_select_strategy=strategy_of(encoder), tie_word_embeddings=bool(text.tie_word_embeddings),
            **self.config_options(model),
        )  # fmt: skip
        config.bos_token_id, config.eos_token_id = text.bos_token_id, text.eos_token_id
        config.pad_token_id = processor.tokenizer.pad_token_id
        return config

    def state(self, model: OpticNerveForConditionalGeneration, rows: int) -> dict[str, Tensor]:
        state = common.under("language_model", common.language_state(model.language_model, rows))
        vision = model.image.encoder.model
        place = "vision_tower" if vision.config.model_type == self.native else "vision_tower.vision_model"
        state |= common.under(place, vision.state_dict())
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
        self._patch_size = encoder.patch_size
        if encoder.native is not None:
            images = tf.PixtralImageProcessor(
                patch_size={"height": encoder.patch_size, "width": encoder.patch_size}, image_mean=encoder.mean,
                size={"longest_edge": encoder.native.max_side * encoder.patch_size}, image_std=encoder.std,
                resample=encoder.resample,
            )  # fmt: skip
            return tf.PixtralProcessor(
                images, processor.tokenizer, patch_size=encoder.patch_size, chat_template=processor.chat_template,
                image_token=processor.image_token, image_break_token="", image_end_token="",
            )  # fmt: skip
        return common.placeholders(
            processor, processor.image_processor, encoder.patch_size, encoder.prefix_tokens, strategy_of(encoder)
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
        if config.vision_config.model_type == self.native:
            notes.append(
                "the processor is Pixtral's without a word at the ends of rows and pictures, which this model never "
                "saw: engines that bring their own processor for Pixtral (vLLM) write them"
            )
        return notes

    def pixels(self, theirs: Tensor, sizes: Tensor | None) -> Tensor:
        if sizes is None:
            return theirs
        pictures = zip(theirs, sizes.tolist(), strict=True)
        return torch.cat([cut_patches(p_CHW[None, :, :h, :w], self._patch_size)[0] for p_CHW, (h, w) in pictures])


def _budget_refusals(encoder: Encoder) -> list[str]:
    """Why a Pixtral's own processor, which knows a longest side alone, would show other patches."""
    layout = encoder.native
    if layout is None or layout.max_side is None:
        return []
    if layout.min_patches == 1 and layout.max_patches >= layout.max_side**2:
        return []
    return [
        f"its pictures have a budget of {layout.min_patches} to {layout.max_patches} patches, Pixtral's own processor "
        f"a longest side alone ({layout.max_side} patches); nearest: min_patches: 1, max_patches: {layout.max_side**2}"
    ]


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


def strategy_of(encoder: Encoder) -> Literal["default", "full"]:
    """Whether LLaVA's class leaves out the first token."""
    first = encoder.class_token == "drop_first" or (encoder.prefix_tokens and encoder.class_token == "drop")
    return "default" if first else "full"
