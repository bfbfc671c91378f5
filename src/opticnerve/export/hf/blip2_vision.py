"""A vision encoder as transformers' `Blip2VisionModel`: a ViT with a class token, norms first, a norm behind the last
block.

ViT (Dosovitskiy et al. 2021) is the same computation under other names. So is DINOv2 (Oquab et al. 2023) once each
block's two scales are multiplied into the matrices before them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_OWN = ("instructblip_vision_model", "blip_2_vision_model")
VISION_ENCODERS = ("vit", "dinov2", *_OWN)

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


def final_norm(model: Any) -> nn.LayerNorm:
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


def vision_config(model: Any) -> dict[str, Any]:
    """Options of a `Blip2VisionConfig`."""
    config = model.config
    options = {
        name: getattr(config, name)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
                     "hidden_act", "layer_norm_eps")
    }  # fmt: skip
    width = getattr(config, "intermediate_size", None) or config.hidden_size * config.mlp_ratio
    if config.model_type == "dinov2":
        width = int(config.hidden_size * config.mlp_ratio)
    return {**options, "intermediate_size": width, "qkv_bias": True}


def vision_state(model: Any) -> dict[str, Tensor]:
    """The tensors under BLIP-2's names; a pooler and a mask token, which no picture goes through, are left out."""
    state = model.state_dict()
    if model.config.model_type in _OWN:
        return _with_bias(state, model.config.hidden_size)
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        if name in _EMBEDDINGS:
            found[_EMBEDDINGS[name]] = tensor
        elif path in _EMBEDDINGS:
            found[f"{_EMBEDDINGS[path]}.{leaf}"] = tensor
    blocks = model.layers if model.config.model_type == "vit" else model.encoder.layer
    for number, block in enumerate(blocks):
        found |= {f"encoder.layers.{number}.{n}": t for n, t in _block(block.state_dict()).items()}
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


def _with_bias(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """BLIP-2's own tensors; queries, keys and values without bias get one of zeros."""
    blank = {
        n.replace(".weight", ".bias"): torch.zeros(3 * width)
        for n in state
        if n.endswith(".qkv.weight") and n.replace(".weight", ".bias") not in state
    }
    return {**state, **blank}
