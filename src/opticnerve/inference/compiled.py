"""Decoding by a compiled step over a static cache: transformers' own, for devices where launching costs more than
computing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

from opticnerve.common.private_names import compile_on_any_device
from opticnerve.types import OpticNerveError


@torch.inference_mode()
def decode_compiled(
    model: Any, inputs: dict[str, Any], *, max_new_tokens: int, cache: None = None, fused: Any = None, **options: Any
) -> Iterator[Tensor]:
    """As `decoding.decode`, all tokens at its end. The prompt is read by `model`, the steps are its language model's.

    Raises:
        OpticNerveError: with cross-attention, or an adapter that steps aside on text: the compiled step knows neither.
    """
    language, ids_BL = model.language_model, inputs.pop("input_ids")
    mask_BL = inputs.pop("attention_mask", None)
    prompt = model.read(ids_BL, **inputs)
    if any(seen is not None for seen in prompt.seen.values()) or prompt.rows_B is not None:
        raise OpticNerveError("compile=True knows neither cross-attention nor lora `when: media`; leave it out")
    # Else transformers compiles on accelerators alone; who asks on a CPU gets it.
    config: Any = CompileConfig(mode="reduce-overhead" if model.device.type == "cuda" else "default")
    compile_on_any_device(config)
    tokens_BT = language.generate(
        inputs_embeds=prompt.embeds_BLD, attention_mask=mask_BL, max_new_tokens=max_new_tokens,
        cache_implementation="static", compile_config=config, **options,
    )  # fmt: skip
    yield from tokens_BT.unbind(1)
