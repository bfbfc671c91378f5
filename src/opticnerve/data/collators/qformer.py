"""Image–caption pairs as a batch for the Q-Former's first stage: pictures for the vision encoder, captions in a BERT's
tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opticnerve.data.collators.base import SampleBatch
from opticnerve.data.media.transform import open_for
from opticnerve.types import Conversation, DataError, OpticNerveError


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
        return int(self.text_mask.sum())


class CaptionCollator:
    """Conversations → `CaptionBatch`: the last answer's words are the caption, the first picture is the image.

    Captions longer than `max_length` tokens end there, with [SEP], as in BLIP-2 (which ends them at 32).
    """

    def __init__(self, image_processor: Any, tokenizer: Any, *, max_length: int) -> None:
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
                f"out share_prefix"
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
            image_keys=torch.tensor([_key(p) for p in pixels]),
            ids=[pair.id or pair.where for pair in pairs],
        )


def _caption(pair: Conversation) -> str:
    where = pair.where or pair.id
    if not pair.images:
        raise DataError(
            "has no picture; qformer_pretraining learns from image–caption pairs", where=where, kind="no-image"
        )
    if not (pair.answer or "").strip():
        raise DataError("has no caption (no assistant's words at the end)", where=where, kind="no-assistant-turn")
    return str(pair.answer)


def _key(pixels: Tensor) -> int:
    """A number for what the picture looks like to the encoder, whatever file it came from."""
    digest = hashlib.blake2b(pixels.contiguous().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
