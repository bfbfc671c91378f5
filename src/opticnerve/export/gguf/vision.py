"""The vision encoder's file for llama.cpp (`mmproj`): a SigLIP with LLaVA's projector, as its `clip_graph_llava` reads
it.

The projector there is always matrix, bias, GELU, matrix, bias. A single matrix W goes in as x = GELU(x) - GELU(-x):
first [W; -W], then [I, -I].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFWriter
from torch import Tensor, nn

from opticnerve.export.gguf.language import add
from opticnerve.export.simplify import connector_matrices, encoder_refusals

if TYPE_CHECKING:
    from opticnerve.encoders.base import Encoder
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.tower import Tower

_GELU = ("gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_VISION = {
    "embeddings.class_embedding": "v.class_embd", "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd", "pre_layrnorm": "v.pre_ln", "post_layernorm": "v.post_ln",
}  # fmt: skip
_BLOCK = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out", "layer_norm1": "ln1", "layer_norm2": "ln2", "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}  # fmt: skip


def refusals(model: OpticNerveForConditionalGeneration) -> list[str]:
    """Why vision encoder and connector cannot be written; empty if they can."""
    if reasons := encoder_refusals(model, "llama.cpp's LLaVA"):
        return reasons
    tower = model.image
    encoder, connector = tower.encoder, model.config.towers["image"]["connector"]
    if encoder.prefix_tokens:
        # Seen in xllamacpp 2026.10: `ggml_concat(inp, class_embedding)`, while positions and rows count it first.
        reasons.append(
            f"its vision encoder is a {encoder.model.config.model_type}, and llama.cpp puts CLIP's class token behind "
            "the patches but reads positions and rows as if it stood before them, so that every patch gets its "
            "neighbour's position and the first is lost; nearest: a SigLIP"
        )
    if encoder.class_token == "drop_first":
        reasons.append("it leaves out the first token (class_token: drop_first), llama.cpp shows all; nearest: drop")
    if isinstance(encoder.layer, list) and _layers(encoder) != sorted(set(_layers(encoder))):
        reasons.append(f"it joins layers {encoder.layer}; llama.cpp joins them in rising order only")
    if (act := encoder.model.config.hidden_act) not in (*_GELU, "quick_gelu", "silu"):
        reasons.append(f"its vision encoder's activation is {act}; llama.cpp's is gelu, quick_gelu or silu")
    match connector["type"]:
        case "linear":
            pass
        case "mlp" if connector["depth"] == 2 and connector["activation"] in _GELU:
            pass
        case "mlp":
            reasons.append(
                f"its mlp has {connector['depth']} layers and {connector['activation']}, llama.cpp's two and gelu; "
                "nearest: connector {type: mlp}"
            )
        case "pixel_shuffle":
            reasons.append(
                "its connector is pixel_shuffle: llama.cpp's Idefics3 and SmolVLM put words of their own around each "
                "picture (<fake_token_around_image><global-img>) and cut it into tiles, which this model never saw; "
                "nearest: connector {type: mlp}, or the format hf-idefics3"
            )
        case other:
            reasons.append(f"its connector is {other}, llama.cpp's LLaVA has an mlp; nearest: connector {{type: mlp}}")
    return reasons


def write(writer: GGUFWriter, tower: Tower, dtype: str) -> None:
    """Sizes and tensors of vision encoder and projector."""
    encoder, config = tower.encoder, tower.encoder.model.config
    layers = _layers(encoder)
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_use_gelu(config.hidden_act in _GELU)
    writer.add_vision_use_silu(config.hidden_act == "silu")
    writer.add_vision_image_size(encoder.image_size)
    writer.add_vision_patch_size(encoder.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_block_count(max(layers))
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_image_mean(encoder.mean)
    writer.add_vision_image_std(encoder.std)
    writer.add_array("clip.vision.feature_layer", layers)
    first, last = connector_matrices(tower.connector)
    writer.add_vision_projection_dim(last.out_features)
    normed = encoder.layer == "last" and config.model_type == "siglip_vision_model"
    for name, tensor in encoder.model.state_dict().items():
        new = _name(name, depth=max(layers), normed=normed)
        if new is not None:
            # Convolutions and tables of positions are added up, not multiplied: they stay exact.
            add(writer, new, tensor.detach().float().numpy(), "float32" if "_embd" in new else dtype)
    for name, (weight, bias) in _projector(first, last).items():
        add(writer, f"{name}.weight", weight, dtype)
        add(writer, f"{name}.bias", bias, dtype)


def _layers(encoder: Encoder) -> list[int]:
    """The entries of `hidden_states` that are read, counted from the input: 0 is what the first block gets."""
    depth = encoder.model.config.num_hidden_layers
    if encoder.layer == "last":
        return [depth]
    given = encoder.layer if isinstance(encoder.layer, list) else [encoder.layer]
    return [i % (depth + 1) for i in given]


def _name(ours: str, *, depth: int, normed: bool) -> str | None:
    """llama.cpp's name of one of the vision encoder's tensors; None for what no picture goes through."""
    if ours == "embeddings.class_embedding":
        return _VISION[ours]
    path, _, leaf = ours.rpartition(".")
    if path.startswith("encoder.layers."):
        number, _, inner = path.removeprefix("encoder.layers.").partition(".")
        return f"v.blk.{number}.{_BLOCK[inner]}.{leaf}" if int(number) < depth else None
    if path == "post_layernorm" and not normed:
        return None
    return f"{_VISION[path]}.{leaf}" if path in _VISION else None


def _projector(first: nn.Linear, last: nn.Linear) -> dict[str, tuple[Any, Any]]:
    w1, b1 = _numbers(first.weight), _bias(first)
    if first is not last:
        return {"mm.0": (w1, b1), "mm.2": (_numbers(last.weight), _bias(last))}
    one = np.eye(len(w1), dtype=np.float32)
    pair = np.concatenate([w1, -w1]), np.concatenate([b1, -b1])
    return {"mm.0": pair, "mm.2": (np.concatenate([one, -one], 1), np.zeros(len(w1), dtype=np.float32))}


def _bias(layer: Any) -> Any:
    return np.zeros(layer.out_features, dtype=np.float32) if layer.bias is None else _numbers(layer.bias)


def _numbers(tensor: Tensor) -> Any:
    return tensor.detach().float().numpy()
