"""What batches share: they move to a device, and one that holds samples by themselves counts them; and what collators
share that make those."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from opticnerve.common.on_host import moved
from opticnerve.data.media.transform import open_for
from opticnerve.ops.segments import Segments
from opticnerve.types import Conversation, Features

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

_B = TypeVar("_B", bound="Moving")


class Moving:
    """A dataclass whose tensors, `Features` and `Segments` go to a device together; all else that it holds stays."""

    def to(self: _B, device: torch.device | str) -> _B:
        """A batch of the same, on that device."""
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})  # type: ignore[type-var,arg-type]


class SampleBatch(Moving):
    """A batch of samples, each by itself: the loss is a mean over them.

    `sources`: (B,) int64, which data entry of the stage each sample is of, where that is known.
    """

    ids: list[str]
    sources: Tensor | None

    @property
    def loss_sources(self) -> Tensor | None:
        """The data entries of what the loss is a mean over."""
        return self.sources

    @property
    def supervised(self) -> int:
        """What the loss is a mean over."""
        return len(self.ids)

    @property
    def samples(self) -> int:
        return len(self.ids)


def _moved(value: object, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return moved(value, device)
    if isinstance(value, Segments):
        return value.to(device)
    if isinstance(value, Features):
        tokens_BND, mask_BN = (_moved(t, device) for t in (value.tokens_BND, value.mask_BN))
        return replace(value, tokens_BND=tokens_BND, mask_BN=mask_BN)
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    return value


class SampleCollator:
    """Conversations → a `SampleBatch` of what the processor makes of their words and first pictures.

    `features`: a `FeatureStore` that knows what the frozen vision encoder saw; pictures are then not opened.
    """

    features: Any = None

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def inputs(self, samples: Sequence[Conversation], words: list[str], **options: Any) -> tuple[Any, Features | None]:
        """The processor's batch, and what stands in for its pixels.

        Raises:
            DataError: a picture that cannot be opened.
        """
        sources, names = [c.images[0].source for c in samples], [c.where or c.id for c in samples]
        pictures, cached = None, None
        if self.features is None:
            prepare = self.processor.image_processor
            pictures = [open_for(prepare, s, where=where) for s, where in zip(sources, names, strict=True)]
        else:
            cached = self.features.rows(sources, names)
        return self.processor(images=pictures, text=words, return_tensors="pt", **options), cached


def open_once(conversation: Conversation, image_processor: BaseImageProcessor, opened: set[Path]) -> None:
    """Open each picture of a conversation whose file is not among those that have been opened: to see that it can be.

    Raises:
        DataError: one cannot.
    """
    for image in conversation.images:
        if not isinstance(image.source, Path) or image.source not in opened:
            open_for(image_processor, image.source, where=conversation.where or conversation.id)
            if isinstance(image.source, Path):
                opened.add(image.source)


def keys_of(values: Iterable[bytes | str]) -> Tensor:
    """64 bits of a hash for each: what can be gathered across processes and compared."""
    contents = (v.encode() if isinstance(v, str) else v for v in values)
    digests = [hashlib.blake2b(content, digest_size=8).digest() for content in contents]
    return torch.tensor([int.from_bytes(d, "big", signed=True) for d in digests], dtype=torch.int64)
