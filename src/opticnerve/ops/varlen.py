"""Attention within segments: rows that hold several samples, or padding, without a mask over the whole row.

A packed row is a chain of segments that do not see each other (`ops.segments`). A mask over the row says so at the
price of all its pairs of positions; here only pairs within a segment are computed, by whoever does that fastest
(`ops.packed_attention`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from opticnerve.common.private_names import attention_of, offers_attention, set_attention
from opticnerve.ops import enabled, tell
from opticnerve.ops.packed_attention import ATTENTIONS, Case, block_mask, choose
from opticnerve.ops.segments import Segments
from opticnerve.types import OpticNerveError

NAME = "opticnerve_segments"

_current: ContextVar[Segments | None] = ContextVar("segments", default=None)
_wanted: ContextVar[str | None] = ContextVar("wanted attention", default=None)


def supported(language_model: PreTrainedModel) -> bool:
    """Whether a language model takes its attention from transformers' interface, and has SDPA for it now."""
    if not enabled():
        return False
    if offers_attention(language_model) and attention_of(_text_config(language_model)) == "sdpa":
        return True
    tell(f"{type(language_model).__name__} does not offer its attention: packed rows have a mask")
    return False


@contextmanager
def within(language_model: PreTrainedModel, segments: Segments | None) -> Iterator[None]:
    """Within it, a forward pass of the language model attends within the segments; `supported` must hold.

    The backward pass may lie outside, but for gradient checkpointing, which computes forward again: enter there, too.
    None changes nothing.
    """
    if segments is None:
        yield
        return
    config = _text_config(language_model)
    if segments.kernel is None:
        segments = replace(segments, kernel=choose(case_of(language_model, segments.branches), _wanted.get()))
        if segments.kernel == "buckets":
            segments = segments.masked()
        for window in {None, getattr(config, "sliding_window", None)} if segments.kernel == "flex" else ():
            if not _row_by_row(segments, window) and window not in segments.block_masks:
                segments.block_masks[window] = block_mask(segments, window)
    before, token = attention_of(config), _current.set(segments)
    set_attention(config, NAME)
    try:
        yield
    finally:
        set_attention(config, before)
        _current.reset(token)


@contextmanager
def attention_by(language_model: PreTrainedModel | None, wanted: str | None) -> Iterator[None]:
    """Within it, packed rows are computed by that one of `ATTENTIONS`; None leaves the choice to it.

    Raises:
        OpticNerveError: it cannot, or the language model keeps its own attention.
    """
    if wanted is not None and enabled():
        if language_model is None or not supported(language_model):
            raise OpticNerveError(
                f"attention: {wanted} is for docked language models that offer their attention; leave it out",
                kind="unsupported",
            )
        choose(case_of(language_model, branches=False), wanted)
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def case_of(language_model: PreTrainedModel, branches: bool, device: torch.device | None = None) -> Case:
    """What a language model's attention asks for. `device`: where it will be, if it is not there yet."""
    config = _text_config(language_model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if (without_positions := getattr(config, "qk_nope_head_dim", None)) is not None:  # DeepSeek's latent attention
        head_dim = without_positions + config.qk_rope_head_dim
    value_dim = getattr(config, "v_head_dim", None) or head_dim
    dropout = getattr(config, "attention_dropout", None) or 0.0
    return Case(device or language_model.device, language_model.dtype, head_dim, value_dim, branches, dropout)


def current() -> Segments | None:
    """The segments that the forward pass in hand attends within, if it does."""
    return _current.get()


def _text_config(language_model: PreTrainedModel) -> Any:
    return language_model.config.get_text_config(decoder=True)


def segmented_attention(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BKLD: Tensor,
    value_BKLD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function by transformers' interface (`AttentionInterface`); returns (B, L, H, D) and no weights.

    It takes from `kwargs` what transformers' SDPA takes, and as that one leaves the rest (soft caps, sinks: families
    that have them do not offer SDPA).
    """
    segments = _current.get()
    assert segments is not None, "outside of `within`"
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError(f"{type(module).__name__} adds a bias by position, which segments do not know")
    if scaling is None:
        scaling = query_BHLD.shape[-1] ** -0.5
    kernel, window = segments.kernel, sliding_window
    assert kernel is not None
    if _row_by_row(segments, sliding_window):
        kernel, window = "buckets", None
    attention = partial(ATTENTIONS[kernel].attend, segments, scaling, dropout, window)
    if segments.spread is None:
        return attention(query_BHLD, key_BKLD, value_BKLD), None
    processes, length = segments.spread
    return processes.attend(attention, length, query_BHLD, key_BKLD, value_BKLD), None


def _row_by_row(segments: Segments, window: int | None) -> bool:
    """Whether causal order says it all: torch's own attention has the fastest kernel for that."""
    return segments.rows and (window is None or window >= segments.layout_BL[0].shape[1])


# Without a mask function of that name transformers makes no mask: the segments say it all.
AttentionInterface.register(NAME, segmented_attention)
