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

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from opticnerve.export.clip_like import connector_matrices, encoder_refusals
from opticnerve.export.formats import Format, Proof
from opticnerve.export.hf import common as hf_common
from opticnerve.export.parity import Reference
from opticnerve.export.samples import Sample
from opticnerve.export.simplify import fix_picture_size, fold_into_norm
from opticnerve.models.vlm.build import merge_adapter

MODEL = "Idefics3ForConditionalGeneration"
OWN = ("idefics3_vision", "smolvlm_vision")
VISION_ENCODERS = (*OWN, "siglip_vision_model")


class HFIdefics3(Format):
    """SigLIP (or Idefics3's own) × pixel_shuffle of one matrix × splice, on a decoder with a plain head."""

    def refuse(self, model: Any, processor: Any) -> list[str]:
        language = hf_common.decoder_refusals(model, "Idefics3's class")
        if reasons := encoder_refusals(model, "Idefics3's class", VISION_ENCODERS):
            return [*reasons, *language]
        return [*shuffle_refusals(model, "Idefics3"), *_picture_refusals(model.image.encoder), *language]

    def simplify(self, model: Any, processor: Any) -> None:
        merge_adapter(model)
        fold_shuffle(model.image)

    def write(self, model: Any, processor: Any, folder: Path) -> list[str]:
        config = _config(model, processor)
        state, theirs = _state(model, config.text_config.vocab_size), _processor(model, processor)
        hf_common.save(folder, model, processor, config=config, state=state, theirs=theirs)
        return [
            "the processor is LLaVA's, for Idefics3's own writes words around each picture that this model never saw: "
            "engines that bring their own processor for Idefics3 (vLLM, llama.cpp) write them, too"
        ]

    def check(
        self, folder: Path, model: Any, processor: Any, samples: Sequence[Sample], wanted: Sequence[Reference],
        scratch: Path,
    ) -> Proof:  # fmt: skip
        return hf_common.prove(folder, MODEL, samples, wanted, scratch, pixels=lambda there: there.flatten(0, 1))


def shuffle_refusals(model: Any, engine: str) -> list[str]:
    """Why vision encoder and connector are no SigLIP behind its final norm with a shuffle and one matrix; empty if they
    are."""
    reasons, options = [], model.config.towers["image"]["connector"]
    if options["type"] != "pixel_shuffle":
        reasons.append(
            f"its connector is {options['type']}, {engine}'s a pixel_shuffle; nearest: connector "
            "{type: pixel_shuffle}"
        )
    elif options["depth"] != 1:
        reasons.append(
            f"its pixel_shuffle has depth {options['depth']}, {engine}'s is one matrix; nearest: connector "
            "{type: pixel_shuffle, depth: 1}"
        )
    if (layer := model.image.encoder.layer) != "last":
        reasons.append(
            f"its vision encoder is read at layer {layer}, {engine}'s behind its final norm; nearest: layer: last"
        )
    return reasons


def fold_shuffle(tower: Any) -> None:
    """Calibration into the vision encoder's final norm and the one matrix; positions for pictures of another size."""
    matrix, _ = connector_matrices(tower.connector)
    fold_into_norm(tower.connector, tower.encoder.model.post_layernorm, matrix)
    if tower.encoder.model.config.model_type not in OWN:
        fix_picture_size(tower.encoder)


def _picture_refusals(encoder: Any) -> list[str]:
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


def _config(model: Any, processor: Any) -> Any:
    language, theirs = model.language_model, model.image.encoder.model.config
    text = copy.deepcopy(language.config)
    text.vocab_size = hf_common.table_rows(model, processor)
    sizes = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
        "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout",
    )  # fmt: skip
    options: dict[str, Any] = {
        "vision_config": {name: getattr(theirs, name) for name in sizes}, "text_config": text,
        "scale_factor": model.image.connector.scale, "image_token_id": model.config.image_token_id,
        "tie_word_embeddings": bool(text.tie_word_embeddings), "pad_token_id": processor.tokenizer.pad_token_id,
    }  # fmt: skip
    config = tf.Idefics3Config(**options)
    return hf_common.nameless(config, ("text_config", "vision_config"), MODEL, language.dtype)


def _state(model: Any, rows: int) -> dict[str, Tensor]:
    """Every tensor under the name of the published Idefics3 and SmolVLM checkpoints."""
    state = {
        n if n.startswith("lm_head.") else f"model.text_model.{n.removeprefix('model.')}": t
        for n, t in hf_common.language_state(model.language_model, rows).items()
    }
    vision_encoder = model.image.encoder.model.state_dict().items()
    state |= {f"model.vision_model.{n}": t for n, t in vision_encoder if not n.startswith("head.")}
    matrix, _ = connector_matrices(model.image.connector)
    state["model.connector.modality_projection.proj.weight"] = matrix.weight
    return hf_common.plain(state, model.language_model.dtype)


def _processor(model: Any, processor: Any) -> Any:
    encoder = model.image.encoder
    images = tf.PerceptionLMImageProcessor(
        vision_input_type="vanilla", tile_size=encoder.image_size, max_num_tiles=1, image_mean=encoder.mean,
        image_std=encoder.std, resample=encoder.resample,
    )  # fmt: skip
    return tf.LlavaProcessor(
        images, processor.tokenizer, patch_size=encoder.patch_size * model.image.connector.scale,
        vision_feature_select_strategy="full", chat_template=processor.chat_template,
        image_token=processor.image_token,
    )  # fmt: skip
