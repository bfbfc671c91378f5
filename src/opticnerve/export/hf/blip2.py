"""`hf-blip2`: stock transformers' `Blip2ForConditionalGeneration`, for docks with a Q-Former.

It holds a whole causal language model of any family, so nothing of that is refused. Queries, Q-Former and projection
have the same names here and there (the way back is `models/import_hf/blip2.py`). The vision encoder is a ViT with a
class token, norms first, and a norm behind the last block; so is ViT (Dosovitskiy et al. 2021) under other names, and
DINOv2 (Oquab et al. 2023) once each block's two scales are multiplied into the matrices before them.
BLIP-2's own processor puts every picture before all words, the begin token included, and knows no chat template.
`LlavaProcessor` writes the placeholders where the template has them; to it a picture is one patch and so many
additional tokens. `AutoProcessor` finds it by its name in processor_config.json.
Source: Li et al. 2023, BLIP-2.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers import PreTrainedConfig

from opticnerve.export.hf import common
from opticnerve.export.samples import ExportSample
from opticnerve.export.simplify import adapter_refusals, encoder_refusals, fix_picture_size, fold_into_norm
from opticnerve.inference.generate import Answerer

if TYPE_CHECKING:
    from opticnerve.encoders.base import Encoder
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.processing import OpticNerveProcessor

_OWN = ("instructblip_vision_model", "blip_2_vision_model")
_VISION_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "hidden_act",
    "layer_norm_eps",
)  # fmt: skip
_EMBEDDINGS = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "layernorm": "post_layernorm",
}
_BLOCK = {
    "layernorm_before": "layer_norm1", "norm1": "layer_norm1", "layernorm_after": "layer_norm2", "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2", "attention.o_proj": "self_attn.projection",
}  # fmt: skip
_SCALES = {"attention.o_proj": "layer_scale1", "mlp.fc2": "layer_scale2"}


class HFBlip2(common.HFFormat):
    """A vision transformer with its class token × qformer × splice, on any causal language model."""

    model_class = "Blip2ForConditionalGeneration"
    parts = ("text_config", "vision_config", "qformer_config")

    def refuse(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> list[str]:
        adapter = adapter_refusals(model)
        if reasons := encoder_refusals(model, "BLIP-2's class", ("vit", "dinov2", *_OWN)):
            return [*reasons, *adapter]
        return [*_connector_refusals(model), *_encoder_refusals(model.image.encoder), *adapter]

    def simplify(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> None:
        super().simplify(model, processor)
        tower = model.image
        fold_into_norm(tower.connector, final_norm(tower.encoder.model), tower.connector.language_projection)
        fold_scales(tower.encoder.model)
        fix_picture_size(tower.encoder)

    def choose(self, samples: Sequence[ExportSample]) -> list[ExportSample]:
        """BLIP-2's class answers nothing without a picture."""
        return [s for s in samples if s.pictures]

    def config(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> Any:
        connector, text = model.image.connector, common.text_config(model, processor)
        # `Blip2ForConditionalGeneration.generate` asks the language model, which takes its ends from its configuration.
        for key, value in Answerer(model, processor).stops().items():
            setattr(text, key, value)
        former = copy.deepcopy(connector.qformer.config)
        former.use_qformer_text_input = False
        options: dict[str, Any] = {
            "vision_config": vision_config(model.image.encoder.model), "qformer_config": former, "text_config": text,
            "num_query_tokens": connector.num_tokens, "image_token_index": model.config.image_token_id,
        }  # fmt: skip
        return tf.Blip2Config(**options)

    def state(self, model: OpticNerveForConditionalGeneration, rows: int) -> dict[str, Tensor]:
        state = common.under("language_model", common.language_state(model.language_model, rows))
        state |= common.under("vision_model", vision_state(model.image.encoder.model))
        for name, tensor in model.image.connector.named_parameters():
            if name.partition(".")[0] in ("query_tokens", "qformer", "language_projection") and not _for_words(name):
                state[name] = tensor
        return state

    def stock_processor(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> Any:
        side, tokens = model.image.encoder.image_size, model.image.connector.num_tokens
        return common.placeholders(processor, processor.image_processor, side, tokens - 1)

    def notes(self, config: PreTrainedConfig) -> list[str]:
        return ["transformers' BLIP-2 takes no prompt without a picture; the model itself does"]


def _connector_refusals(model: OpticNerveForConditionalGeneration) -> list[str]:
    options = model.config.towers["image"]["connector"]
    if options["type"] != "qformer":
        return [f"its connector is {options['type']}, BLIP-2's a qformer; nearest: connector {{type: qformer}}"]
    if options["instruct"]:
        return [
            "its qformer reads the question, as InstructBLIP's does, which is another class of transformers; nearest: "
            "connector {type: qformer, instruct: false}"
        ]
    return []


def _encoder_refusals(encoder: Encoder) -> list[str]:
    reasons = common.layer_refusals(encoder, "BLIP-2")
    if encoder.class_token != "keep":
        reasons.append(
            "its connector does not see the class token, BLIP-2's Q-Former does; nearest: encoder {class_token: keep}"
        )
    if getattr(encoder.model.config, "use_swiglu_ffn", False):
        reasons.append(
            "its vision encoder has gated feed-forward layers (SwiGLU), BLIP-2's plain ones; nearest: a smaller DINOv2"
        )
    return reasons


def _for_words(name: str) -> bool:
    """Whether a tensor is of the words' branch, which BLIP-2's first stage trains and generation never uses."""
    return ".intermediate." in name or (".output." in name and "attention." not in name)


# -- the vision encoder as a `Blip2VisionModel` -----------------------------------------------------------------------


def final_norm(model: OpticNerveForConditionalGeneration) -> nn.LayerNorm:
    """The norm behind the last block."""
    found = model.post_layernorm if model.config.model_type in _OWN else model.layernorm
    assert isinstance(found, nn.LayerNorm)
    return found


@torch.no_grad()
def fold_scales(model: Any) -> None:
    """Multiply each scale of a DINOv2's blocks into the matrix and the bias before it, in place."""
    for block in model.encoder.layer if model.config.model_type == "dinov2" else ():
        for path, name in _SCALES.items():
            matrix, scale_D = block.get_submodule(path), block.get_submodule(name).lambda1
            matrix.weight.mul_(scale_D[:, None])
            matrix.bias.mul_(scale_D)
            scale_D.fill_(1)


def vision_config(model: OpticNerveForConditionalGeneration) -> dict[str, Any]:
    """Options of a `Blip2VisionConfig`."""
    config = model.config
    width = getattr(config, "intermediate_size", None)
    if config.model_type == "dinov2" or not width:
        width = int(config.hidden_size * config.mlp_ratio)
    return {**{n: getattr(config, n) for n in _VISION_SIZES}, "intermediate_size": width, "qkv_bias": True}


def vision_state(model: Any) -> dict[str, Tensor]:
    """The tensors under BLIP-2's names; a pooler and a mask token, which no picture goes through, are left out."""
    state = model.state_dict()
    if model.config.model_type in _OWN:  # queries, keys and values without bias get one of zeros
        biases = {n.replace(".weight", ".bias") for n in state if n.endswith(".qkv.weight")} - set(state)
        return {**state, **{n: torch.zeros(3 * model.config.hidden_size) for n in biases}}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        if name in _EMBEDDINGS:
            found[_EMBEDDINGS[name]] = tensor
        elif path in _EMBEDDINGS:
            found[f"{_EMBEDDINGS[path]}.{leaf}"] = tensor
    blocks = model.layers if model.config.model_type == "vit" else model.encoder.layer
    for number, block in enumerate(blocks):
        found |= common.under(f"encoder.layers.{number}", _block(block.state_dict()))
    return found


def _block(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, new in _BLOCK.items():
        for leaf in ("weight", "bias"):
            if (tensor := state.get(f"{path}.{leaf}")) is not None:
                found[f"{new}.{leaf}"] = tensor
    names = [f"attention.{p}_proj" for p in "qkv"]
    found["self_attn.qkv.weight"] = torch.cat([state[f"{n}.weight"] for n in names])
    nothing = torch.zeros(len(state[f"{names[0]}.weight"]))
    found["self_attn.qkv.bias"] = torch.cat([state.get(f"{n}.bias", nothing) for n in names])
    return found
