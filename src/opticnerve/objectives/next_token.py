"""The language-modelling objective: predict the assistant's tokens, and compute logits nowhere else."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from opticnerve.language.segments import supported, within
from opticnerve.objectives.base import Objective
from opticnerve.types import OpticNerveError

IGNORE = -100


class NextToken(Objective):
    """The assistant's next token: the sum over supervised tokens, so that any split of a batch adds up exactly.

    The LM head runs on the supervised positions alone: a hook on it gathers them, so that whatever a language model
    does to its logits afterwards (scaling, soft caps) still happens.
    """

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """`batch`: a `Batch`. Returns the float32 loss sum and the number of supervised tokens, both scalars."""
        keep_BL = batch.targets != IGNORE
        logits_MV = batch_logits(self.model, batch, keep_BL)
        loss = F.cross_entropy(logits_MV.float(), batch.targets[keep_BL], reduction="sum")
        return loss, keep_BL.sum()


def batch_logits(model: Any, batch: Any, keep_BL: Tensor) -> Tensor:
    """Logits (M, V) of a batch's rows at the M positions where `keep_BL` is True, pictures and packing and all."""
    language_model = model.language_model
    prompt = model.read(batch.input_ids, group=None if batch.plain else batch.group, **batch.media)
    by_segment = supported(language_model)
    if not batch.plain and not by_segment:
        _check_window(language_model.config, batch.input_ids.shape[1])
    with model.looking(prompt), within(language_model, batch.segments if by_segment else None):
        return supervised_logits(
            language_model,
            keep_BL,
            inputs_embeds=prompt.embeds_BLD,
            position_ids=batch.positions,
            attention_mask=None if by_segment else batch.attention_mask(prompt.embeds_BLD.dtype),
        )


def _check_window(config: Any, length: int) -> None:
    """A mask of ours replaces the language model's own, sliding windows included: refuse rows that would notice."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    if window and length > window:
        raise OpticNerveError(
            f"a packed row has {length} tokens, but {config.model_type} attends within {window}: lower per_image, or "
            f"set share_prefix: false"
        )


def supervised_logits(language_model: nn.Module, keep_BL: Tensor, **inputs: Any) -> Tensor:
    """Logits (M, V) of the M positions where `keep_BL` is True."""
    head = language_model.get_output_embeddings()  # type: ignore[operator]
    seen = 0

    def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal seen
        seen += 1
        return (args[0][keep_BL].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(gather)
    try:
        logits: Tensor = language_model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    assert seen == 1, "the language model ran its LM head more or less than once"
    return logits.squeeze(0)
