"""Pictures to pixel values as an image processor makes them, without what it does beside.

transformers' torchvision-backed processors copy a picture five times before it is small: to an array, to channels
first, into a stack of equal shapes, out of it, into the batch. Most of them come down to four steps: pad to a square
(some), resize, cut out the middle (some), normalise. `pixels` takes the same steps, with the processor's own resize
and crop, picture by picture where it lies, and writes each into its place in the batch: the same bits. A processor
that does anything else is called as it is; `steps` decides that by looking at its methods and options.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from opticnerve.data.media.images import Source
from opticnerve.data.media.open import open_image

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

# Pillow's pixels are read here, never written: no reason to copy them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

GAP = 2
"""A JPEG is decoded at no less than so many times the size that it is resized to.

The antialiased resize that follows then hides most of the difference to a full decoding (Pillow's own `reducing_gap`
for thumbnails is the same 2; see docs/performance.md for the differences).
"""

DECODING = 1
"""Goes up whenever the same file comes out as other pixels: what is kept of pictures on disk must name it."""


@dataclass(frozen=True, slots=True)
class Steps:
    """What an image processor does, in this order. Sizes are (height, width) in pixels."""

    pad: bool
    size: tuple[int, int]
    """What the picture, or with `shortest` its shorter side, is resized to."""
    shortest: bool
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of 8-bit values: 0 to 255."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.crop or self.size


@dataclass(frozen=True, slots=True)
class Bytes:
    """Pixels before they are normalised: a quarter of what crosses from process to process and to a device.

    `pixels_BCHW`: uint8; `mean`, `std`: of 8-bit values, one for each channel.
    """

    pixels_BCHW: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.pixels_BCHW)

    def pin_memory(self) -> Bytes:
        """The same in page-locked memory."""
        return replace(self, pixels_BCHW=self.pixels_BCHW.pin_memory())

    def normalised(self, device: torch.device | str | None = None) -> Tensor:
        """`pixel_values` (B, 3, H, W) float32, computed on that device."""
        pixels_BCHW = self.pixels_BCHW.to(device, non_blocking=True)
        out_BCHW = _floats(pixels_BCHW.shape, pixels_BCHW.device)
        _normalise(pixels_BCHW, self.mean, self.std, out_BCHW)
        return out_BCHW


def open_for(image_processor: BaseImageProcessor, source: Source, *, where: str = "") -> PIL.Image.Image:
    """`open_image` to be read, not written: a JPEG is decoded no larger than `image_processor` has use for, and what is
    opened already is not copied.

    Training, feature caches, evaluation and inference open their pictures here, so that a picture looks the same
    everywhere. Only where `steps` knows the processor; tiling and others that look at a picture's size get all of it.
    """
    known = steps(image_processor)
    at_least = None if known is None else (GAP * known.size[0], GAP * known.size[1])
    return open_image(source, where=where, at_least=at_least, copy=False)


def pixels(
    image_processor: BaseImageProcessor, pictures: Sequence[PIL.Image.Image], *, compact: bool = False
) -> dict[str, Any]:
    """What `image_processor(pictures, return_tensors="pt")` gives a model: `pixel_values` and, of tiles, `image_sizes`.

    Args:
        pictures: of mode RGB, as `open_image` gives them.
        compact: leave `pixel_values` as `Bytes`, where `steps` knows the processor.
    """
    known = steps(image_processor)
    if known is None:
        made = image_processor(list(pictures), return_tensors="pt")
        return {k: made[k] for k in ("pixel_values", "image_sizes") if k in made}
    shape = (len(pictures), 3, *known.shape)
    out_BCHW = torch.empty(shape, dtype=torch.uint8) if compact else _floats(shape, torch.device("cpu"))
    for picture, out_CHW in zip(pictures, out_BCHW, strict=True):
        small_CHW = _shrink(image_processor, known, picture)
        if compact:
            out_CHW.copy_(small_CHW)
        else:
            _normalise(small_CHW, known.mean, known.std, out_CHW)
    return {"pixel_values": Bytes(out_BCHW, known.mean, known.std) if compact else out_BCHW}


def steps(image_processor: BaseImageProcessor) -> Steps | None:
    """The steps of an image processor, or None where it does, or may do, something else.

    It must be a torchvision-backed processor of transformers with the methods that it inherits (or LLaVA's, which pads
    to a square first), resize by bilinear or bicubic interpolation, normalise, and end in one shape for all pictures.
    """
    from transformers.image_processing_backends import TorchvisionBackend

    from opticnerve.common.private_names import PREPROCESS_STEPS, preprocess_of

    if not isinstance(image_processor, TorchvisionBackend):
        return None
    kind: Any = type(image_processor)
    p: Any = image_processor
    pads = any(preprocess_of(kind) is preprocess_of(c) for c in kind.__mro__ if _is_llava(c))
    inherited = (*_INHERITED, *PREPROCESS_STEPS)
    inherits = all(getattr(kind, name) is getattr(TorchvisionBackend, name) for name in inherited)
    if (
        not inherits
        or not (pads or preprocess_of(kind) is preprocess_of(TorchvisionBackend))
        or (p.do_pad and not pads)
    ):
        return None
    if not (p.do_resize and p.do_rescale and p.do_normalize and p.resample in (2, 3) and p.rescale_factor):
        return None
    mean, std, size, crop = p.image_mean, p.image_std, _sides(p.size), None
    if size is None or any(not isinstance(m, list | tuple) or len(m) != 3 for m in (mean, std)):
        return None
    shortest = p.size.shortest_edge is not None
    if getattr(p, "do_center_crop", False):
        crop = _sides(p.crop_size)
        if crop is None or p.crop_size.shortest_edge or crop[0] > size[0] or crop[1] > size[1]:
            return None  # it would pad with black
    elif shortest and not p.do_pad:
        return None  # pictures of other proportions come out in other shapes
    fused_mean, fused_std = (tuple((torch.tensor(m) * (1.0 / p.rescale_factor)).tolist()) for m in (mean, std))
    return Steps(bool(p.do_pad), size, shortest, crop, fused_mean, fused_std)


_INHERITED = (
    "__call__", "preprocess", "process_image", "rescale_and_normalize", "normalize", "fetch_images",
)  # fmt: skip


def _is_llava(kind: type) -> bool:
    # By name: importing the class would cost each worker some tenths of a second where nothing pads.
    return (kind.__module__, kind.__name__) == (
        "transformers.models.llava.image_processing_llava",
        "LlavaImageProcessor",
    )


def _sides(size: Any) -> tuple[int, int] | None:
    """Height and width, or twice the shorter side; None where a size says more, or less, than one of these."""
    if size is None or size.longest_edge or size.max_height or size.max_width:
        return None
    if size.shortest_edge:
        return (size.shortest_edge, size.shortest_edge)
    return (size.height, size.width) if size.height and size.width else None


def _shrink(image_processor: Any, known: Steps, picture: PIL.Image.Image) -> Tensor:
    """(3, H, W) uint8, as the processor has it before it normalises."""
    if known.pad:
        side = max(picture.size)
        pixels_HWC = np.empty((side, side, 3), np.uint8)
        pixels_HWC[:] = [int(m * 255) for m in image_processor.image_mean]
        top, left = (side - picture.height) // 2, (side - picture.width) // 2
        pixels_HWC[top : top + picture.height, left : left + picture.width] = np.asarray(picture)
    else:
        pixels_HWC = np.array(picture)  # a copy: torch warns of memory that nobody may write to
    # Channels stay last in memory: torch's 8-bit resize is made for that, and nothing is copied.
    pixels_CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)
    small_CHW: Tensor = image_processor.resize(
        image=pixels_CHW, size=image_processor.size, resample=image_processor.resample
    )
    if known.crop is not None:
        small_CHW = image_processor.center_crop(small_CHW, image_processor.crop_size)
    return small_CHW


def _floats(shape: Sequence[int], device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(shape, device=device)
    # torch aligns what it takes, and glibc then cannot put a batch where one of the same size has been: a process that
    # takes batches of 10 MB would grow by 500.
    return torch.from_numpy(np.empty(shape, np.float32))


def _normalise(pixels_CHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...], out_CHW: Tensor) -> None:
    # Subtract, then divide, as torchvision does: a product with the inverse would differ in the last bit.
    if out_CHW.device.type == "cpu":
        # numpy computes the same bits in this thread alone. torch's threads would each wait for a core that a worker
        # keeps busy: 1.1 instead of 0.05 ms a picture.
        mean_C11, std_C11 = (np.asarray(v, np.float32)[:, None, None] for v in (mean, std))
        out = out_CHW.numpy()
        np.subtract(pixels_CHW.numpy(), mean_C11, out=out)
        np.divide(out, std_C11, out=out)
        return
    torch.sub(pixels_CHW, _channels(mean, out_CHW.device), out=out_CHW)
    out_CHW.div_(_channels(std, out_CHW.device))


@lru_cache(maxsize=32)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1), sent to the device once: each time would be a wait for all that it has to do."""
    return torch.tensor(values, device=device)[:, None, None]
