"""The language model's file for llama.cpp: Llama (SmolLM2, Mistral), Qwen2 and Qwen3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3,
}  # fmt: skip
TYPES = {
    "float32": GGMLQuantizationType.F32, "f16": GGMLQuantizationType.F16, "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}  # fmt: skip
_FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}  # fmt: skip


def refusals(language_model: PreTrainedModel) -> list[str]:
    """Why a language model cannot be written; empty if it can."""
    config = language_model.config
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        return [f"its language model is a {config.model_type}; written are {known}"]
    reasons = []
    if getattr(config, "hidden_act", "silu") != "silu":
        reasons.append(f"its language model has hidden_act {config.hidden_act}; llama.cpp's has silu")
    if getattr(config, "mlp_bias", False):
        reasons.append("its language model has biases in its feed-forward layers; llama.cpp's has none")
    if (window := getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True):
        reasons.append(f"its language model looks back {window} tokens only (sliding_window); nearest: one without")
    scaling = getattr(language_model.model.rotary_emb, "attention_scaling", 1.0)
    if scaling != 1.0:
        reasons.append(f"its positions scale attention by {scaling:g} (YaRN), which is not there yet")
    return reasons


def write(writer: GGUFWriter, language_model: PreTrainedModel, dtype: str) -> None:
    """Sizes and tensors. `dtype`: of `TYPES`."""
    config = language_model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head)
    theta = float(config.rope_parameters["rope_theta"])
    writer.add_rope_freq_base(theta)
    _add_frequencies(writer, language_model, theta, head)
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    rotates_pairs = architecture is gguf.MODEL_ARCH.LLAMA
    for name, tensor in language_model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise OpticNerveError(
                f"llama.cpp's {config.model_type} has no place for the tensor {name}", kind="unsupported"
            )
        values = tensor.detach().float().numpy()
        if rotates_pairs and ".self_attn.q_proj." in name:
            values = _neighbours(values, heads)
        elif rotates_pairs and ".self_attn.k_proj." in name:
            values = _neighbours(values, kv_heads)
        add(writer, new, values, dtype)


def _neighbours(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of a query or key matrix for rotation of neighbours (llama.cpp's Llama), from that of halves (ours)."""
    pairs = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _add_frequencies(writer: GGUFWriter, language_model: PreTrainedModel, theta: float, head: int) -> None:
    """How rotary frequencies differ from the plain ones (Llama 3's stretching): what llama.cpp divides them by."""
    plain = 1.0 / theta ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    divisors = plain / language_model.model.rotary_emb.inv_freq.double().cpu()
    if bool(((divisors - 1).abs() > 1e-3).any()):
        writer.add_tensor("rope_freqs.weight", divisors.float().numpy())


def add(writer: GGUFWriter, name: str, values: NDArray[Any], dtype: str) -> None:
    """A tensor in the file's type; vectors stay in float32, and rows that no block of 8 bits fits go in 16."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    kind = TYPES[dtype] if values.ndim > 1 else GGMLQuantizationType.F32
    if kind is GGMLQuantizationType.Q8_0 and values.shape[-1] % 32:
        kind = GGMLQuantizationType.F16
    if kind is GGMLQuantizationType.F16 and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise OpticNerveError(
            f"{name} holds numbers beyond what 16-bit floats can; export with --dtype bf16", kind="too-large"
        )
    if kind is GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
