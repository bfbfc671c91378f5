"""Vision encoders and audio encoders that attend by plain products while a stage trains, or sees all pictures for its
cache, on a CPU.

They share the products of the language model's segments (`language.attention`), which in bfloat16 take half the time of
torch's kernel, forward and backward. Answers afterwards are computed by torch's, as everywhere else in transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from opticnerve.common.private_names import attention_of, set_attention
from opticnerve.encoders.base import Encoder
from opticnerve.ops.attention import attend

NAME = "opticnerve_eyes"


@contextmanager
def plain_attention(model: Any) -> Iterator[int]:
    """Within it, the encoders in `model` that have torch's attention have ours where it is faster; yields how many
    configurations say so."""
    wrapped = (m for encoder in model.modules() if isinstance(encoder, Encoder) for m in encoder.modules())
    configs = {id(m.config): m.config for m in wrapped if isinstance(m, PreTrainedModel)}
    changed = [c for c in configs.values() if attention_of(c) == "sdpa"]
    for config in changed:
        set_attention(config, NAME)
    try:
        yield len(changed)
    finally:
        for config in changed:
            set_attention(config, "sdpa")


def vision_attention(
    module: Any,
    query_BHLD: Tensor,
    key_BKLD: Tensor,
    value_BKLD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function by transformers' interface (`AttentionInterface`); returns (B, L, H, D) and no weights."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    all_see_all = attention_mask is None and not causal and query_BHLD.shape[2] == key_BKLD.shape[2]
    if not all_see_all or dropout:
        return sdpa_attention_forward(
            module, query_BHLD, key_BKLD, value_BKLD, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, **kwargs,
        )  # fmt: skip
    scaling = query_BHLD.shape[-1] ** -0.5 if scaling is None else scaling
    out_BHLD = attend(query_BHLD, key_BKLD, value_BKLD, scaling, causal=False)
    return out_BHLD.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, vision_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
