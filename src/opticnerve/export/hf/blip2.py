"""`hf-blip2`: stock transformers' `Blip2ForConditionalGeneration`, for docks with a Q-Former.

It holds a whole causal language model of any family, so nothing of that is refused. Queries, Q-Former and projection
have the same names here and there (the way back is `models/import_hf/blip2.py`); the vision encoder's are in
`hf_blip2_eye.py`. BLIP-2's own processor puts every picture before all words, the begin token included, and knows no
chat template. `LlavaProcessor` writes the placeholders where the template has them; to it a picture is one patch and so
many additional tokens. `AutoProcessor` finds it by its name in processor_config.json.
Source: Li et al. 2023, BLIP-2.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers as tf
from torch import Tensor

from opticnerve.export.clip_like import encoder_refusals
from opticnerve.export.formats import Format, Proof
from opticnerve.export.hf import common as hf_common
from opticnerve.export.hf.blip2_vision import VISION_ENCODERS, final_norm, fold_scales, vision_config, vision_state
from opticnerve.export.parity import Reference
from opticnerve.export.samples import Sample
from opticnerve.export.simplify import fix_picture_size, fold_into_norm
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.build import merge_adapter

MODEL = "Blip2ForConditionalGeneration"


class HFBlip2(Format):
    """A vision transformer with its class token × qformer × splice, on any causal language model."""

    def refuse(self, model: Any, processor: Any) -> list[str]:
        if reasons := encoder_refusals(model, "BLIP-2's class", VISION_ENCODERS):
            return [*reasons, *hf_common.gate_refusals(model)]
        return [*_connector_refusals(model), *_encoder_refusals(model.image.encoder), *hf_common.gate_refusals(model)]

    def simplify(self, model: Any, processor: Any) -> None:
        merge_adapter(model)
        tower = model.image
        fold_into_norm(tower.connector, final_norm(tower.encoder.model), tower.connector.language_projection)
        fold_scales(tower.encoder.model)
        fix_picture_size(tower.encoder)

    def choose(self, samples: Sequence[Sample]) -> list[Sample]:
        """BLIP-2's class answers nothing without a picture."""
        return [s for s in samples if s.pictures]

    def write(self, model: Any, processor: Any, folder: Path) -> list[str]:
        config = _config(model, processor)
        state, theirs = _state(model, config.text_config.vocab_size), _processor(model, processor)
        hf_common.save(folder, model, processor, config=config, state=state, theirs=theirs)
        return ["transformers' BLIP-2 takes no prompt without a picture; the model itself does"]

    def check(
        self, folder: Path, model: Any, processor: Any, samples: Sequence[Sample], wanted: Sequence[Reference],
        scratch: Path,
    ) -> Proof:  # fmt: skip
        return hf_common.prove(folder, MODEL, samples, wanted, scratch)


def _connector_refusals(model: Any) -> list[str]:
    options = model.config.towers["image"]["connector"]
    if options["type"] != "qformer":
        return [f"its connector is {options['type']}, BLIP-2's a qformer; nearest: connector {{type: qformer}}"]
    if options["instruct"]:
        return [
            "its qformer reads the question, as InstructBLIP's does, which is another class of transformers; nearest: "
            "connector {type: qformer, instruct: false}"
        ]
    return []


def _encoder_refusals(encoder: Any) -> list[str]:
    reasons = []
    if encoder.layer != "last":
        reasons.append(
            f"its vision encoder is read at layer {encoder.layer}, BLIP-2's behind its final norm; nearest: layer: last"
        )
    if encoder.class_token != "keep":
        reasons.append(
            "its connector does not see the class token, BLIP-2's Q-Former does; nearest: encoder {class_token: keep}"
        )
    if getattr(encoder.model.config, "use_swiglu_ffn", False):
        reasons.append(
            "its vision encoder has gated feed-forward layers (SwiGLU), BLIP-2's plain ones; nearest: a smaller DINOv2"
        )
    return reasons


def _config(model: Any, processor: Any) -> Any:
    connector, text = model.image.connector, copy.deepcopy(model.language_model.config)
    text.vocab_size = hf_common.table_rows(model, processor)
    # `Blip2ForConditionalGeneration.generate` asks the language model, which takes its ends from its configuration.
    for key, value in Answerer(model, processor).stops().items():
        setattr(text, key, value)
    former = copy.deepcopy(connector.qformer.config)
    former.use_qformer_text_input = False
    config: Any = tf.Blip2Config(
        vision_config=vision_config(model.image.encoder.model), qformer_config=former, text_config=text,
        num_query_tokens=connector.num_tokens, image_token_index=model.config.image_token_id,
    )  # fmt: skip
    parts = ("text_config", "vision_config", "qformer_config")
    return hf_common.nameless(config, parts, MODEL, model.language_model.dtype)


def _state(model: Any, rows: int) -> dict[str, Tensor]:
    state = {f"language_model.{n}": t for n, t in hf_common.language_state(model.language_model, rows).items()}
    state |= {f"vision_model.{n}": t for n, t in vision_state(model.image.encoder.model).items()}
    for name, tensor in model.image.connector.named_parameters():
        if name.partition(".")[0] in ("query_tokens", "qformer", "language_projection") and not _for_words(name):
            state[name] = tensor
    return hf_common.plain(state, model.language_model.dtype)


def _for_words(name: str) -> bool:
    """Whether a tensor is of the words' branch, which BLIP-2's first stage trains and generation never uses."""
    return ".intermediate." in name or (".output." in name and "attention." not in name)


def _processor(model: Any, processor: Any) -> Any:
    tower = model.image
    return tf.LlavaProcessor(
        processor.image_processor, processor.tokenizer, patch_size=tower.encoder.image_size,
        vision_feature_select_strategy="full", chat_template=processor.chat_template,
        image_token=processor.image_token, num_additional_image_tokens=tower.connector.num_tokens - 1,
    )  # fmt: skip
