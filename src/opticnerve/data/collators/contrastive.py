"""Pictures and their captions as a batch: for contrastive learning, and for the Q-Former's first stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opticnerve.common.on_host import on_host
from opticnerve.data.collators.base import SampleBatch, SampleCollator, keys_of
from opticnerve.data.media.open import image_digest
from opticnerve.data.media.transform import open_for
from opticnerve.types import Conversation, DataError, MediaProcessor, OpticNerveError

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase


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
    sources: Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(on_host(self.attention_mask).sum())


class PairCollator(SampleCollator):
    """Conversations of one picture and one caption each → `PairBatch`.

    What the user says beside the picture ("Describe this.") is left out: the caption is the assistant's turn.

    Args:
        processor: a `DualEncoderProcessor`; it cuts captions at `max_length` tokens (its own by default).
    """

    def __init__(self, processor: MediaProcessor, *, max_length: int | None = None) -> None:
        super().__init__(processor)
        self.limit = {} if max_length is None else {"max_length": max_length}

    def __call__(self, rows: Sequence[Sequence[Conversation]]) -> PairBatch:
        """`rows`: the conversations of each sample; all of them become pairs.

        Raises:
            DataError: a conversation without exactly one picture and one caption, or whose picture cannot be opened.
        """
        conversations = [c for row in rows for c in row]
        captions = [caption_of(c) for c in conversations]
        batch, cached = self.inputs(conversations, captions, **self.limit)
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        digest = image_digest if self.features is None else self.features.digest
        return PairBatch(
            input_ids=ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            pixel_values=batch.get("pixel_values"),
            caption_keys=keys_of(" ".join(c.lower().split()) for c in captions),
            image_keys=keys_of(digest(c.images[0].source) for c in conversations),
            captions=captions,
            ids=[c.id for c in conversations],
            image_features=None if cached is None else cached.tokens_BND[:, 0],
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
            where=conversation.where or conversation.id, kind="no-pair",
            remedy="give captions (one sample each), not dialogues",
        )  # fmt: skip
    return said[0].text.strip()


# -- the Q-Former's first stage: captions in a BERT's tokens ----------------------------------------------------------


@dataclass
class CaptionBatch(SampleBatch):
    """Image–caption pairs.

    `pixel_values` (B, 3, H, W); `text_ids`, `text_mask` (B, L): the caption between [CLS] and [SEP], padded on the
    right; `image_keys` (B,) int64: equal where the pictures are.
    """

    pixel_values: Tensor
    text_ids: Tensor
    text_mask: Tensor
    image_keys: Tensor
    ids: list[str]

    @property
    def tokens(self) -> int:
        return int(on_host(self.text_mask).sum())


class CaptionCollator:
    """Conversations → `CaptionBatch`: the last answer's words are the caption, the first picture is the image.

    Captions longer than `max_length` tokens end there, with [SEP], as in BLIP-2 (which ends them at 32).
    """

    def __init__(
        self, image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase, *, max_length: int
    ) -> None:
        self.image_processor, self.tokenizer, self.max_length = image_processor, tokenizer, max_length

    def __call__(self, rows: Sequence[Sequence[Conversation]]) -> CaptionBatch:
        """One conversation a row.

        Raises:
            DataError: a sample without a picture or without a caption; a picture that cannot be opened.
            OpticNerveError: several conversations in a row.
        """
        if any(len(row) != 1 for row in rows):
            raise OpticNerveError(
                f"qformer_pretraining takes one caption a sample, not {max(map(len, rows))} about one picture: leave "
                f"out share_prefix",
                kind="conflict",
            )
        pairs = [row[0] for row in rows]
        captions = [_caption(pair) for pair in pairs]
        pictures = [open_for(self.image_processor, p.images[0].source, where=p.where or p.id) for p in pairs]
        pixels = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        words = self.tokenizer(
            captions, padding="longest", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return CaptionBatch(
            pixel_values=pixels,
            text_ids=words["input_ids"],
            text_mask=words["attention_mask"].bool(),
            image_keys=keys_of(p.contiguous().numpy().tobytes() for p in pixels),  # whatever files they came from
            ids=[pair.id or pair.where for pair in pairs],
        )


def _caption(pair: Conversation) -> str:
    where = pair.where or pair.id
    if not pair.images:
        problem = "has no picture; qformer_pretraining learns from image–caption pairs"
        raise DataError(problem, where=where, kind="no-image")
    if not (pair.answer or "").strip():
        raise DataError("has no caption (no assistant's words at the end)", where=where, kind="no-assistant-turn")
    return str(pair.answer)
