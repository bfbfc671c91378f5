"""Pictures and their captions as a batch for contrastive learning."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opticnerve.data.collators.base import SampleBatch
from opticnerve.data.media.open import image_digest
from opticnerve.data.media.transform import open_for
from opticnerve.types import Conversation, DataError


@dataclass
class PairBatch(SampleBatch):
    """B pairs.

    `input_ids`, `attention_mask`: (B, L) int64. `pixel_values`: (B, 3, H, W) float32, or None where `image_features`
    (B, D), a vision encoder's pooled vectors from a cache, stand in for it. `caption_keys`, `image_keys`: (B,) int64,
    equal numbers for equal captions and for equal pictures.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor | None
    caption_keys: Tensor
    image_keys: Tensor
    captions: list[str]
    ids: list[str]
    image_features: Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(self.attention_mask.sum())


class PairCollator:
    """Conversations of one picture and one caption each → `PairBatch`.

    What the user says beside the picture ("Describe this.") is left out: the caption is the assistant's turn.

    Args:
        processor: a `DualEncoderProcessor`; it cuts captions at `max_length` tokens (its own by default).

    `features`: a `FeatureStore` that knows what the frozen vision encoder saw; pictures are then not opened.
    """

    features: Any = None

    def __init__(self, processor: Any, *, max_length: int | None = None) -> None:
        self.processor, self.max_length = processor, max_length

    def __call__(self, rows: Sequence[Sequence[Conversation]]) -> PairBatch:
        """`rows`: the conversations of each sample; all of them become pairs.

        Raises:
            DataError: a conversation without exactly one picture and one caption, or whose picture cannot be opened.
        """
        conversations = [c for row in rows for c in row]
        captions = [caption_of(c) for c in conversations]
        sources, places = [c.images[0].source for c in conversations], [c.where or c.id for c in conversations]
        pictures, seen = None, None
        digest = image_digest if self.features is None else self.features.digest
        if self.features is None:
            prepare = self.processor.image_processor
            pictures = [open_for(prepare, s, where=where) for s, where in zip(sources, places, strict=True)]
        else:
            seen = self.features.rows(sources, places).tokens_BND[:, 0]
        limit = {} if self.max_length is None else {"max_length": self.max_length}
        batch = self.processor(images=pictures, text=captions, return_tensors="pt", **limit)
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        return PairBatch(
            input_ids=ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            pixel_values=batch.get("pixel_values"),
            caption_keys=_keys(" ".join(c.lower().split()) for c in captions),
            image_keys=_keys(digest(s) for s in sources),
            captions=captions,
            ids=[c.id for c in conversations],
            image_features=seen,
        )


def caption_of(conversation: Conversation) -> str:
    """The words of the only assistant turn, where there is exactly one picture.

    Raises:
        DataError: otherwise.
    """
    images, said = len(conversation.images), [m for m in conversation.messages if m.role == "assistant"]
    if images != 1 or len(said) != 1 or not said[0].text.strip():
        raise DataError(
            f"contrastive learning takes one picture and one caption; this sample has {images} pictures and "
            f"{sum(bool(m.text.strip()) for m in said)} answers",
            where=conversation.where or conversation.id,
            remedy="give captions (one sample each), not dialogues",
            kind="no-pair",
        )
    return said[0].text.strip()


def _keys(values: Any) -> Tensor:
    """64 bits of a hash for each text: what can be gathered across processes and compared."""
    digests = [hashlib.blake2b(v.encode(), digest_size=8).digest() for v in values]
    return torch.tensor([int.from_bytes(d, "big", signed=True) for d in digests], dtype=torch.int64)
