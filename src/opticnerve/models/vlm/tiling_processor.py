"""Pictures to tiles: LLaVA-NeXT's own image processor, its tiles laid flat.

transformers' `LlavaNextImageProcessor` gives `pixel_values` of (images, most tiles, 3, S, S), filled up with zeros.
A model that works tile by tile wants the tiles alone.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoImageProcessor, BatchFeature, LlavaNextImageProcessor
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessorKwargs

from opticnerve.models.vlm.configuration import OpticNerveConfig
from opticnerve.models.vlm.tiling_spec import TilingSpec
from opticnerve.types import OpticNerveError


class TilingImageProcessorKwargs(LlavaNextImageProcessorKwargs, total=False):
    """`thumbnail`: whether the whole picture, squashed to one tile, goes first."""

    thumbnail: bool


class TilingImageProcessor(LlavaNextImageProcessor):
    """Pictures → `pixel_values` (tiles of all pictures, 3, S, S) and `image_sizes` (images, 2) as height, width.

    `image_grid_pinpoints`, `crop_size` (the tile), mean, deviation and resampling are as in
    `LlavaNextImageProcessor`.
    """

    valid_kwargs = TilingImageProcessorKwargs
    thumbnail = True

    def _preprocess(  # type: ignore[override]
        self, images: list[Any], *, thumbnail: bool, return_tensors: Any, **kwargs: Any
    ) -> BatchFeature:
        tiled = super()._preprocess(images, **{**kwargs, "do_pad": False, "return_tensors": None})
        tiles = [t if thumbnail else t[1:] for t in tiled["pixel_values"]]
        data = {"pixel_values": torch.cat(tiles), "image_sizes": tiled["image_sizes"]}
        return BatchFeature(data=data, tensor_type=return_tensors)


def tiling_image_processor(spec: TilingSpec, own: Any) -> TilingImageProcessor:
    """The image processor of a tiling, with the normalisation of the encoder's `own` one.

    How `own` makes a picture square (crop, pad, squash) does not matter: tiles are square already, and the thumbnail
    is squashed, as in LLaVA-NeXT.

    Raises:
        OpticNerveError: `own` says nothing of mean and deviation.
    """
    if getattr(own, "image_mean", None) is None or getattr(own, "image_std", None) is None:
        raise OpticNerveError(
            f"tiling needs an image processor with image_mean and image_std; {type(own).__name__} has none"
        )
    kept = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample", "do_convert_rgb")
    side = {"height": spec.tile_size, "width": spec.tile_size}
    options: dict[str, Any] = {k: v for k in kept if (v := getattr(own, k, None)) is not None}
    options |= {"size": side, "crop_size": side, "thumbnail": spec.thumbnail}
    return TilingImageProcessor(image_grid_pinpoints=[list(p) for p in spec.pinpoints], **options)


AutoImageProcessor.register(
    OpticNerveConfig, image_processor_classes={"torchvision": TilingImageProcessor}, exist_ok=True
)
