"""Attention within segments: rows that hold several samples, or padding, without a mask over the whole row.

A packed row is a chain of segments that do not see each other. A mask over the row says so at the price of all its
pairs of positions; here the segments of a batch are laid beside each other instead, those of like length together, and
only pairs within a segment are computed. What FlashAttention's `varlen` kernels do on a GPU (Dao 2023,
FlashAttention-2, section 3), in plain torch, on any device. A segment is causal: what pads it on the right is seen by
nobody before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from opticnerve.common.private_names import attention_of, offers_attention, set_attention
from opticnerve.ops import enabled, tell
from opticnerve.ops.attention import attend
from opticnerve.ops.sequence import SequenceGroup
from opticnerve.types import AutogradContext

NAME = "opticnerve_segments"
LIKE = 0.75
"""Segments lie together if the shortest has at least this share of the longest's positions."""


@dataclass(frozen=True)
class Bucket:
    """Segments of like length.

    `index_NL`: for each of N segments its places among the batch's B·L; what pads it repeats its last one. `pads_P`:
    where the padding stands among the N·L.
    `mask_NLL`: bool, who sees whom, where causal order alone does not say; `back_NLL`: how many positions each lies
    behind each other, for sliding windows. None where order says both.
    """

    index_NL: Tensor
    pads_P: Tensor
    mask_NLL: Tensor | None = None
    back_NLL: Tensor | None = None

    def sees(self, window: int | None) -> Tensor | None:
        """`mask_NLL` within a sliding window."""
        if window is None or self.mask_NLL is None or self.back_NLL is None:
            return self.mask_NLL
        return self.mask_NLL & (self.back_NLL < window)

    def to(self, device: torch.device | str) -> Bucket:
        moved = (t if t is None else t.to(device, non_blocking=True) for t in vars(self).values())
        return Bucket(*moved)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Segments:
    """The segments of a batch.

    `back_T`: for each of the B·L positions its place among those of all buckets, one after the other. `pads_P`: the
    positions that belong to no segment.
    `rows`: each row of the batch is one causal segment already, padded on the right: nothing is laid elsewhere.
    `spread`: the processes that share the L positions, and L; of what attention is given each holds its part.
    """

    buckets: tuple[Bucket, ...]
    back_T: Tensor | None = None
    pads_P: Tensor | None = None
    rows: bool = False
    spread: tuple[SequenceGroup, int] | None = None

    def to(self, device: torch.device | str) -> Segments:
        back_T, pads_P = (t if t is None else t.to(device, non_blocking=True) for t in (self.back_T, self.pads_P))
        return Segments(tuple(b.to(device) for b in self.buckets), back_T, pads_P, self.rows, self.spread)


def segments_of(group_BL: Tensor, branch_BL: Tensor, positions_BL: Tensor) -> Segments:
    """The segments of rows as `data.encode.packing` makes them.

    Args:
        group_BL: which sample, or group of samples with a common beginning, each position belongs to; -1 for padding.
        branch_BL: within a group: 0 for what all its samples share, which each of them sees; 1, 2, … for each's own.
        positions_BL: within a sample; a branch's go on from what it shares.
    """
    length = group_BL.shape[1]
    found: list[tuple[int, int, bool]] = []  # where it starts among the B·L, how long it is, whether it has branches
    for row, (groups, branches) in enumerate(zip(group_BL, branch_BL, strict=True)):
        values, counts = torch.unique_consecutive(groups, return_counts=True)
        start = 0
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            if value >= 0:
                found.append((row * length + start, count, bool(branches[start : start + count].any())))
            start += count
    if len(found) == len(group_BL) and all(s % length == 0 and not b for s, _, b in found):
        return Segments((), rows=True)
    order = sorted(range(len(found)), key=lambda i: -found[i][1])
    buckets, back_T, filled = [], torch.zeros(group_BL.numel(), dtype=torch.long), 0
    while order:
        longest = found[order[0]][1]
        together = [i for i in order if found[i][1] >= LIKE * longest and found[i][2] == found[order[0]][2]]
        order = [i for i in order if i not in together]
        steps_L = torch.arange(longest)
        index_NL = torch.stack([found[i][0] + steps_L.clamp(max=found[i][1] - 1) for i in together])
        for n, i in enumerate(together):
            start, count, _ = found[i]
            back_T[start : start + count] = filled + n * longest + torch.arange(count)
        filled += index_NL.numel()
        lengths_N = torch.tensor([found[i][1] for i in together])
        pads_P = (steps_L >= lengths_N[:, None]).flatten().nonzero().flatten()
        if found[together[0]][2]:
            position_NL = positions_BL.flatten()[index_NL]
            back_NLL = position_NL[:, :, None] - position_NL[:, None, :]
            buckets.append(Bucket(index_NL, pads_P, _branches(branch_BL.flatten()[index_NL]), back_NLL))
        else:
            buckets.append(Bucket(index_NL, pads_P))
    return Segments(tuple(buckets), back_T, (group_BL.flatten() < 0).nonzero().flatten())


def _branches(branch_NL: Tensor) -> Tensor:
    """(N, L, L): position i sees j where j stands before it, in the common beginning or in the same branch."""
    length = branch_NL.shape[1]
    sees = (branch_NL[:, :, None] == branch_NL[:, None, :]) | (branch_NL[:, None, :] == 0)
    return sees & torch.ones(length, length, dtype=torch.bool).tril()


_current: ContextVar[Segments | None] = ContextVar("segments", default=None)


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
    before, token = attention_of(config), _current.set(segments)
    set_attention(config, NAME)
    try:
        yield
    finally:
        set_attention(config, before)
        _current.reset(token)


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
    attention = partial(_within, segments, scaling, dropout, sliding_window)
    if segments.spread is None:
        return attention(query_BHLD, key_BKLD, value_BKLD), None
    processes, length = segments.spread
    return processes.attend(attention, length, query_BHLD, key_BKLD, value_BKLD), None


def _within(
    segments: Segments, scaling: float, dropout: float, window: int | None, query_BHLD: Tensor, key_BKLD: Tensor,
    value_BKLD: Tensor,
) -> Tensor:  # fmt: skip
    """(B, L, H, D) of all positions."""
    if segments.rows:
        out_BHLD = attend(query_BHLD, key_BKLD, value_BKLD, scaling, dropout=dropout, window=window)
        return out_BHLD.transpose(1, 2).contiguous()
    rows, _, length, _ = query_BHLD.shape
    flat = (t.transpose(1, 2).flatten(0, 1) for t in (query_BHLD, key_BKLD, value_BKLD))  # each (B·L, heads, D)
    laid = zip(*(_Lay.apply(t, segments) for t in flat), strict=True)
    done = []
    for bucket, (q, k, v) in zip(segments.buckets, laid, strict=True):  # each (N, L', heads, D)
        out_NHLD = attend(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scaling, mask_NLL=bucket.sees(window),
            dropout=dropout, window=window if bucket.mask_NLL is None else None,
        )  # fmt: skip
        done.append(out_NHLD.transpose(1, 2))
    out_BLHD: Tensor = _GatherRows.apply(segments, *done).unflatten(0, (rows, length))
    return out_BLHD


class _Lay(torch.autograd.Function):
    """(B·L, heads, D) → for each bucket (N, L', heads, D). Each position stands in one place: backward is a gather."""

    @staticmethod
    def forward(ctx: AutogradContext, flat: Tensor, segments: Segments) -> tuple[Tensor, ...]:
        ctx.segments = segments
        return tuple(_laid(flat, b, zeros=False) for b in segments.buckets)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor, None]:
        return _gathered(grads, ctx.segments), None


class _GatherRows(torch.autograd.Function):
    """The way back; what pads a segment on its right gets no gradient, and so gives none to the keys before it."""

    @staticmethod
    def forward(ctx: AutogradContext, segments: Segments, *laid: Tensor) -> Tensor:
        ctx.segments = segments
        return _gathered(laid, segments)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(_laid(grad, b, zeros=True) for b in ctx.segments.buckets)


def _laid(flat: Tensor, bucket: Bucket, *, zeros: bool) -> Tensor:
    out = flat.index_select(0, bucket.index_NL.flatten())
    if zeros:
        out.index_fill_(0, bucket.pads_P, 0)
    found: Tensor = out.unflatten(0, bucket.index_NL.shape)
    return found


def _gathered(laid: Sequence[Tensor], segments: Segments) -> Tensor:
    assert segments.back_T is not None
    assert segments.pads_P is not None
    out = torch.cat([t.flatten(0, 1) for t in laid]).index_select(0, segments.back_T)
    return out.index_fill_(0, segments.pads_P, 0)


# Without a mask function of that name transformers makes no mask: the segments say it all.
AttentionInterface.register(NAME, segmented_attention)
