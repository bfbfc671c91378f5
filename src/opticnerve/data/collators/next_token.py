"""Rows to a batch of tensors. Pictures are opened and prepared here, in whichever process the data loader runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opticnerve.common.on_host import on_host
from opticnerve.data.collators.base import Moving
from opticnerve.data.encode.packing import Row
from opticnerve.data.encode.tokenize import IGNORE
from opticnerve.data.media.audio import open_audio
from opticnerve.data.media.transform import open_for, pixels
from opticnerve.ops.segments import Segments, segments_of
from opticnerve.types import ChatProcessor


@dataclass
class Batch(Moving):
    """What a training step takes.

    `input_ids`, `positions`, `targets`, `group`, `branch`: (B, L) int64, padded on the right (group -1).
    `learned_M`: (M,) int64, which of the B·L positions have a target.
    `media`: tensors by the names of the model's inputs: `pixel_values` (images or tiles, 3, H, W), `image_sizes`,
    `image_pools` (images,), where frames of videos are pooled,
    `qformer_input_ids`, `input_features` (windows, mels, frames), …, or `image_features` (`Features`, what the frozen
    vision encoder saw); empty where there are none.
    `sources`: (B, L) int64, which data entry of the stage a position is of (-1 where it is padding), where it is known.
    `plain`: every row is one sample, a causal mask is enough. `segments`: who attends to whom, without a mask.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    learned_M: Tensor
    group: Tensor
    branch: Tensor
    media: dict[str, Any]
    plain: bool
    ids: list[str]
    samples: int
    segments: Segments
    sources: Tensor | None = field(default=None, kw_only=True)

    @property
    def supervised(self) -> int:
        return len(self.learned_M)

    @property
    def tokens(self) -> int:
        return int((on_host(self.group) >= 0).sum())

    @property
    def loss_sources(self) -> Tensor | None:
        """(M,): the data entries of what the loss is a mean over."""
        return None if self.sources is None else self.sources.flatten()[self.learned_M]

    @property
    def places(self) -> int:
        """Positions that are computed, padding included."""
        return self.input_ids.numel()

    def attention_mask(self, dtype: torch.dtype) -> Tensor | None:
        """Additive mask (B, 1, L, L): 0 where i may see j, the least number elsewhere; None where causal is enough."""
        if self.plain:
            return None
        same_group = self.group[:, :, None] == self.group[:, None, :]
        sees = (self.branch[:, :, None] == self.branch[:, None, :]) | (self.branch[:, None, :] == 0)
        length = self.group.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.group.device).tril()
        allowed = same_group & sees & causal
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
            ~allowed, torch.finfo(dtype).min
        )[:, None]


class Collator:
    """Rows → `Batch`, with the processor's image processor, feature extractor and padding token.

    `features`: a `FeatureStore` that knows what the frozen vision encoder saw; pictures are then not opened.
    `compact`: pixels stay 8-bit (`data.media.transform.Bytes`) until somebody normalises them, where that can be done.
    """

    features: Any = None
    compact = False

    def __init__(self, processor: ChatProcessor) -> None:
        self.processor = processor
        self.pad = processor.tokenizer.pad_token_id

    def __call__(self, rows: Sequence[Row]) -> Batch:
        length = max(len(r) for r in rows)

        def pad(name: str, value: int) -> Tensor:
            return torch.tensor([getattr(r, name) + [value] * (length - len(r)) for r in rows])

        group, branch, positions, targets = (
            pad("group", -1),
            pad("branch", 0),
            pad("positions", 0),
            pad("targets", IGNORE),
        )
        return Batch(
            input_ids=pad("input_ids", self.pad),
            positions=positions,
            targets=targets,
            learned_M=(targets != IGNORE).flatten().nonzero().squeeze(1),
            group=group,
            branch=branch,
            media=self.media(rows),
            plain=all(r.plain for r in rows),
            ids=[i for r in rows for i in r.ids],
            samples=sum(len(r.ids) for r in rows),
            segments=segments_of(group, branch, positions),
            sources=_sources(rows, length),
        )

    def media(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The rows' pictures and sounds as the model's inputs."""
        found: dict[str, Any] = {}
        shown = [(i.source, r.ids[0]) for r in rows for i in r.images]
        if shown and self.features is not None:
            found["image_features"] = self.features.rows(*zip(*shown, strict=True))
        elif shown:
            prepare = self.processor.image_processor
            pictures = [open_for(prepare, source, where=where) for source, where in shown]
            found |= pixels(prepare, pictures, compact=self.compact)
        pools = [i.pool for r in rows for i in r.images]
        if any(pool > 1 for pool in pools):
            found["image_pools"] = torch.tensor(pools)
        if shown and self.processor.reads_questions:
            found |= self.processor.read_questions([q for r in rows for q in r.questions])
        sounds = [(a, r.ids[0]) for r in rows for a in r.audios]
        if sounds:
            rate = self.processor.feature_extractor.sampling_rate
            samples = [open_audio(a.source, where=where, rate=rate) for a, where in sounds]
            found["input_features"] = self.processor.extract(samples)[0]
        return found


def _sources(rows: Sequence[Row], length: int) -> Tensor | None:
    if not all(r.sources for r in rows):
        return None
    return torch.tensor([[r.sources[g] for g in r.group] + [-1] * (length - len(r)) for r in rows])
