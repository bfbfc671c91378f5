"""`hf-idefics3`: stock transformers' `Idefics3ForConditionalGeneration`, for docks that shuffle pixels.

The model is Idefics3's: a SigLIP behind its final norm, squares of tokens side by side, one matrix without bias, a
decoder. The processor is not. Idefics3's own, and SmolVLM's, write `<fake_token_around_image><global-img>` before each
picture and one more word behind it, whatever they are told; a model that was not trained so would answer otherwise.
Two other stock parts write nothing but placeholders and give pictures the shape that Idefics3 takes (pictures, 1, 3,
height, width): `LlavaProcessor`, for which a square of tokens is one patch, and PerceptionLM's image processor with a
single tile. `AutoProcessor` finds both by their names in processor_config.json.
Sources: Laurençon et al. 2024, Building and better understanding vision-language models; transformers'
`Idefics3Connector` and `Idefics3VisionEmbeddings`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedConfig

from opticnerve.export.hf import common
from opticnerve.export.simplify import connector_matrices, encoder_refusals, fix_picture_size, fold_into_norm

if TYPE_CHECKING:
    from opticnerve.encoders.base import Encoder
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.processing import OpticNerveProcessor

OWN = ("idefics3_vision", "smolvlm_vision")
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout",
)  # fmt: skip


class HFIdefics3(common.HFFormat):
    """SigLIP (or Idefics3's own) × pixel_shuffle of one matrix × splice, on a decoder with a plain head."""

    model_class = "Idefics3ForConditionalGeneration"

    def refuse(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> list[str]:
        language = common.decoder_refusals(model, "Idefics3's class")
        if reasons := encoder_refusals(model, "Idefics3's class", (*OWN, "siglip_vision_model")):
            return [*reasons, *language]
        encoder = model.image.encoder
        reasons = [*_connector_refusals(model), *common.layer_refusals(encoder, "Idefics3")]
        return [*reasons, *_picture_refusals(encoder), *language]

    def simplify(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> None:
        super().simplify(model, processor)
        tower = model.image
        matrix, _ = connector_matrices(tower.connector)
        fold_into_norm(tower.connector, tower.encoder.model.post_layernorm, matrix)
        if tower.encoder.model.config.model_type not in OWN:
            fix_picture_size(tower.encoder)

    def config(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> Any:
        text, theirs = common.text_config(model, processor), model.image.encoder.model.config
        options: dict[str, Any] = {
            "vision_config": {name: getattr(theirs, name) for name in _SIZES}, "text_config": text,
            "scale_factor": model.image.connector.pool[0], "image_token_id": model.config.image_token_id,
            "tie_word_embeddings": bool(text.tie_word_embeddings), "pad_token_id": processor.tokenizer.pad_token_id,
        }  # fmt: skip
        return tf.Idefics3Config(**options)

    def state(self, model: OpticNerveForConditionalGeneration, rows: int) -> dict[str, Tensor]:
        """Under the names of the published Idefics3 and SmolVLM checkpoints."""
        state = {
            n if n.startswith("lm_head.") else f"model.text_model.{n.removeprefix('model.')}": t
            for n, t in common.language_state(model.language_model, rows).items()
        }
        vision_encoder = model.image.encoder.model.state_dict().items()
        state |= {f"model.vision_model.{n}": t for n, t in vision_encoder if not n.startswith("head.")}
        matrix, _ = connector_matrices(model.image.connector)
        return {**state, "model.connector.modality_projection.proj.weight": matrix.weight}

    def stock_processor(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> Any:
        encoder = model.image.encoder
        images = tf.PerceptionLMImageProcessor(
            vision_input_type="vanilla", tile_size=encoder.image_size, max_num_tiles=1, image_mean=encoder.mean,
            image_std=encoder.std, resample=encoder.resample,
        )  # fmt: skip
        return common.placeholders(processor, images, encoder.patch_size * model.image.connector.pool[0])

    def notes(self, config: PreTrainedConfig) -> list[str]:
        return [
            "the processor is LLaVA's, for Idefics3's own writes words around each picture that this model never saw: "
            "engines that bring their own processor for Idefics3 (vLLM, llama.cpp) write them, too"
        ]

    def pixels(self, theirs: Tensor, sizes: Tensor | None) -> Tensor:
        return theirs.flatten(0, 1)


def _connector_refusals(model: OpticNerveForConditionalGeneration) -> list[str]:
    options = model.config.towers["image"]["connector"]
    if options["type"] != "pixel_shuffle":
        return [
            f"its connector is {options['type']}, Idefics3's a pixel_shuffle; nearest: connector "
            "{type: pixel_shuffle}"
        ]
    if options["depth"] != 1:
        return [
            f"its pixel_shuffle has depth {options['depth']}, Idefics3's is one matrix; nearest: connector "
            "{type: pixel_shuffle, depth: 1}"
        ]
    return []


def _picture_refusals(encoder: Encoder) -> list[str]:
    reasons = []
    if encoder.fit != "squash" or encoder.crop_pct != 1:
        reasons.append(
            f"it prepares pictures with fit: {encoder.fit}, crop_pct: {encoder.crop_pct:g}, and the image processor "
            "that goes with Idefics3 makes them square by squashing; nearest: fit: squash"
        )
    side = encoder.image_size // encoder.patch_size
    if encoder.model.config.model_type not in OWN and not _counts_places(side):
        better = next(n for n in range(side, 0, -1) if _counts_places(n)) * encoder.patch_size
        reasons.append(
            f"its pictures make {side} × {side} patches, for which Idefics3 gives two neighbours the same position (it "
            f"counts them in fractions of 32 bits); nearest: image_size: {better}"
        )
    return reasons


def _counts_places(side: int) -> bool:
    """Whether Idefics3 numbers the patches of a full picture as SigLIP does: by its own arithmetic, and no other."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    places = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor([side]))
    found = torch.bucketize(places.clamp(max=1.0 - 1e-6), boundaries, right=True)
    return bool((found == torch.arange(side)).all())
