"""What every encoder promises: media tensor in, `Features` out, and three declared facts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from opticnerve.types import Features, OpticNerveError


class Encoder(nn.Module, ABC):
    """An eye or an ear.

    A subclass sets, by the end of its constructor,
    `hidden_size` (width D of a token), `num_tokens` (tokens N of one image, fixed) and `options` (the plain keywords
    that build the same module again with random weights: they go into `config.json`).
    It never projects to the language model's width and never freezes itself.
    """

    modality: ClassVar[Literal["image", "audio"]] = "image"
    hidden_size: int
    num_tokens: int
    options: dict[str, Any]
    files: list[str]

    @classmethod
    @abstractmethod
    def from_pretrained(cls, name: str, **options: Any) -> Encoder:
        """The encoder with its pretrained weights, by hub name, local folder or starter name."""

    @abstractmethod
    def forward(self, pixel_values: Tensor) -> Features:
        """`pixel_values` (B, 3, H, W) float → `Features` of (B, num_tokens, hidden_size)."""

    @abstractmethod
    def image_processor(self) -> Any:
        """The transformers image processor that turns pictures into this encoder's `pixel_values`."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The encoder's blocks from input to output: what `encoder.last(N)` counts."""

    def weight_files(self) -> list[str]:
        """The files that the weights came from, for the content hash; empty when there are none."""
        return list(getattr(self, "files", ()))


def last_blocks(encoder: Encoder, count: int) -> list[nn.Module]:
    """The last `count` blocks of an encoder; more than it has is an error with both numbers."""
    blocks = encoder.blocks()
    if not 0 < count <= len(blocks):
        raise OpticNerveError(
            f"encoder.last({count}): this encoder has {len(blocks)} blocks; ask for 1 to {len(blocks)}"
        )
    return blocks[-count:]


def make_image_processor(
    *, size: int, mean: list[float], std: list[float], fit: str = "squash", resample: int = 3
) -> Any:
    """An image processor for square inputs.

    `fit`: "squash" resizes to size × size (SigLIP), "crop" resizes the shorter side and crops the centre (CLIP),
    "pad" pads to a square first (LLaVA-1.5). `resample` is PIL's number (3 is bicubic).
    """
    import transformers as tf

    common: dict[str, Any] = {"image_mean": mean, "image_std": std, "resample": resample, "do_convert_rgb": True}
    if fit == "squash":
        return tf.SiglipImageProcessor(size={"height": size, "width": size}, **common)
    if fit == "crop":
        return tf.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **common)
    if fit == "pad":
        return tf.LlavaImageProcessor(
            do_pad=True, size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **common
        )
    raise OpticNerveError(f"unknown fit {fit!r}; known: squash, crop, pad")
