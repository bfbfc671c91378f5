"""What every encoder promises: media tensor in, `Features` out, and three declared facts."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from opticnerve.types import Features, OpticNerveError


class Encoder(nn.Module, ABC):
    """A vision encoder or an audio encoder.

    A subclass sets, by the end of its constructor,
    `hidden_size` (width D of a token), `num_tokens` (tokens N of one piece of media, fixed) and `options` (the plain
    keywords that build the same module again with random weights: they go into `config.json`). A vision encoder also
    sets `image_size`, the side of its square input in pixels.
    It never projects to the language model's width and never freezes itself.
    """

    modality: ClassVar[Literal["image", "audio"]] = "image"
    needs_name: ClassVar[bool] = True
    """False where there are no pretrained weights to name (raw patches)."""
    hidden_size: int
    num_tokens: int
    image_size: int
    options: dict[str, Any]
    files: list[str]

    @classmethod
    @abstractmethod
    def from_pretrained(cls, name: Any, **options: Any) -> Encoder:
        """The encoder with its pretrained weights, by hub name, local folder or starter name."""

    @classmethod
    def planned(cls, name: Any, **options: Any) -> Encoder:
        """The same module with random weights: configurations are read, no weight is. (`plan` calls it on the meta
        device.)

        By default the constructor is called with `name` if it takes one.
        """
        if "name" in inspect.signature(cls.__init__).parameters:
            options["name"] = name
        elif cls.needs_name:
            raise OpticNerveError(
                f"{cls.__name__} cannot be foreseen: it needs a classmethod `planned(name, **options)`"
            )
        return cls(**options)

    @classmethod
    def take_name(cls, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Split a recipe's options into what names the weights and the rest.

        Raises:
            OpticNerveError: there is no name, and this encoder needs one.
        """
        rest = dict(options)
        name = rest.pop("name", None)
        if name is None and cls.needs_name:
            raise OpticNerveError(f"{cls.__name__} needs a name: a hub name, a local folder, or starter/…")
        return name, rest

    @classmethod
    def loading_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Of `self.options` as a configuration keeps them, those that `from_pretrained` takes beside the name."""
        return {k: v for k, v in options.items() if k not in ("name", "architecture")}

    @abstractmethod
    def forward(self, media: Tensor) -> Features:
        """(B, *media_shape) float → `Features` of (B, num_tokens, hidden_size)."""

    def image_processor(self) -> Any:
        """The transformers image processor that turns pictures into this encoder's `pixel_values`."""
        raise OpticNerveError(f"{type(self).__name__} sees no pictures")

    def feature_extractor(self) -> Any:
        """The transformers feature extractor that turns sound into this encoder's `input_features`."""
        raise OpticNerveError(f"{type(self).__name__} hears no sound")

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The encoder's blocks from input to output: what `encoder.last(N)` counts."""

    @property
    def media_shape(self) -> tuple[int, ...]:
        """Shape of one piece of media as `forward` takes it, without the batch."""
        return (3, self.image_size, self.image_size)

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


FITS = ("squash", "squash_float", "crop", "pad")


def make_image_processor(
    *, size: int, mean: list[float], std: list[float], fit: str = "squash", resample: int = 3, crop_pct: float = 1.0
) -> Any:
    """An image processor for square inputs.

    `fit`: "squash" resizes to size × size (SigLIP), "crop" resizes the shorter side and crops the centre (CLIP),
    "pad" pads to a square first (LLaVA-1.5), "squash_float" squashes without rounding to 8 bits (DINOv3).
    `crop_pct`: how much of the resized side the square in the middle keeps, as timm has it: with 0.875 a picture is
    resized to 256 where `size` is 224 (DINOv2). `resample` is PIL's number (3 is bicubic).
    """
    import transformers as tf

    if fit not in FITS:
        raise OpticNerveError(f"unknown fit {fit!r}; known: {', '.join(FITS)}")
    if crop_pct != 1 and (fit not in ("squash", "crop") or not crop_pct > 0):
        raise OpticNerveError(
            f"crop_pct: {crop_pct} does not go with fit: {fit}; it is above 0, and for squash and crop"
        )
    common: dict[str, Any] = {"image_mean": mean, "image_std": std, "resample": resample, "do_convert_rgb": True}
    square = {"height": size, "width": size}
    resized = int(size / crop_pct + 1e-6)  # rounded down, as timm does
    if fit == "crop":
        return tf.CLIPImageProcessor(size={"shortest_edge": resized}, crop_size=square, **common)
    if fit == "pad":
        return tf.LlavaImageProcessor(do_pad=True, size={"shortest_edge": size}, crop_size=square, **common)
    if fit == "squash_float":
        return tf.DINOv3ViTImageProcessor(size=square, **common)
    if resized != size:
        return tf.CLIPImageProcessor(size={"height": resized, "width": resized}, crop_size=square, **common)
    return tf.SiglipImageProcessor(size=square, **common)
