"""Tiles without a canvas of their own: a picture is squashed to rows × columns of tiles, which are read one by one,
each whole, and then the whole picture as a thumbnail; a picture of one tile is that tile alone.

Sources: InternVL 1.5 (Chen et al. 2024, How Far Are We to GPT-4V?, section 3.2: the canvas of the nearest aspect
ratio); Idefics3 (Laurençon et al. 2024, section 3.1) and SmolVLM: the longest side is resized to so many pixels, both
sides then to whole tiles; nanoVLM (github.com/huggingface/nanoVLM, `data/custom_transforms.py`): both at once, and the
thumbnail goes first.

All write words among the placeholders: `PictureWords`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from PIL.Image import Resampling, fromarray
from torch import Tensor
from transformers import BaseImageProcessor, BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import SizeDict
from transformers.models.got_ocr2.image_processing_got_ocr2 import (
    get_all_supported_aspect_ratios,
    get_optimal_tiled_canvas,
)
from transformers.processing_utils import ImagesKwargs

from opticnerve.types import OpticNerveError

Rule = Literal["internvl", "idefics3", "nanovlm"]
_OPTIONS: dict[str, tuple[str, ...]] = {
    "internvl": ("split", "min_tiles", "max_tiles"), "idefics3": ("split", "longest_side"),
    "nanovlm": ("split", "longest_side", "enlarge", "thumbnail"),
}  # fmt: skip
LONGEST = 4096
"""Pixels of a side: Idefics3 takes no more, whatever it is told."""


@dataclass(frozen=True)
class SplitLayout:
    """Into how many tiles a picture is cut. Plain numbers, no tensors. As `TileLayout`, for `Tiling` and processors.

    Args:
        tile_size: side of a tile in pixels: the encoder's input.
        tile_tokens: soft tokens of one tile, after the connector.
        rule: how rows and columns are found.
        min_tiles, max_tiles: of the rule "internvl", without the thumbnail.
        longest_side: of the rules "idefics3" and "nanovlm", in pixels; None leaves a picture its size.
        split: False shows each picture as one tile.
        enlarge: of the rule "nanovlm": whether small pictures get the longest side, too.
        thumbnail: of the rule "nanovlm": whether there is one.
    """

    tile_size: int
    tile_tokens: int
    rule: Rule
    min_tiles: int = 1
    max_tiles: int = 12
    longest_side: int | None = None
    split: bool = True
    enlarge: bool = True
    thumbnail: bool = True
    newline: ClassVar[bool] = False

    @lru_cache(maxsize=4096)  # noqa: B019  (frozen and small: a few of them per process)
    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles, without the thumbnail."""
        if not self.split:
            return 1, 1
        side = self.tile_size
        if self.rule == "internvl":
            columns, rows = get_optimal_tiled_canvas((height, width), (side, side), self.min_tiles, self.max_tiles)
            return int(rows), int(columns)
        if self.rule == "nanovlm":  # `DynamicResize`, in its order of operations
            longest, most = max(height, width), self.longest_side or LONGEST
            target = most if self.enlarge else min(most, ceil(longest / side) * side)
            shorter = max(ceil(min(height, width) * (target / longest) / side), 1)
            return (shorter, target // side) if width >= height else (target // side, shorter)
        height, width = self.first_size(height, width)
        ratio = width / height
        if width >= height:
            columns = ceil(width / side)
            return ceil(int(columns * side / ratio) / side), columns
        rows = ceil(height / side)
        return rows, ceil(int(rows * side * ratio) / side)

    def first_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that a picture is resized to before it is cut (rule "idefics3"; transformers'
        `get_resize_output_image_size`)."""
        if self.longest_side is None or self.rule != "idefics3":
            return height, width
        longest, ratio = self.longest_side, width / height
        if width >= height:
            height, width = int(longest / ratio), longest
            height += height % 2
        else:
            height, width = longest, int(longest * ratio)
            width += width % 2
        height, width = max(height, 1), max(width, 1)
        ratio = width / height
        if width >= height and width > LONGEST:
            return max(int(LONGEST / ratio), 1), LONGEST
        if height > width and height > LONGEST:
            return LONGEST, max(int(LONGEST * ratio), 1)
        return height, width

    def num_pieces(self, height: int, width: int) -> int:
        """Tiles of a picture of `height` × `width` pixels, thumbnail included."""
        rows, columns = self.shape(height, width)
        return rows * columns + (self.thumbnail and rows * columns > 1)

    def num_tokens(self, height: int, width: int) -> int:
        """Soft tokens of one picture: placeholders that the processor writes, words not counted."""
        return self.num_pieces(height, width) * self.tile_tokens

    @property
    def pinpoints(self) -> list[tuple[int, int]]:
        """Heights and widths of pictures that each keep their shape, from a single tile to the most tiles."""
        side = self.tile_size
        if not self.split:
            return [(side, side)]
        if self.rule == "internvl":
            shapes = get_all_supported_aspect_ratios(self.min_tiles, self.max_tiles)
            return [(rows * side, columns * side) for columns, rows in shapes]
        longest = min(self.longest_side or LONGEST, LONGEST)
        return [(n * side, longest) for n in range(1, ceil(longest / side))] + [(longest, longest)]

    @property
    def max_tokens(self) -> int:
        """The most soft tokens that any picture can take."""
        return max(self.num_tokens(*size) for size in self.pinpoints)

    def layout(self, height: int, width: int) -> np.ndarray[Any, Any]:
        """The order in which a picture's tokens are read: tile by tile, as they come."""
        return np.arange(self.num_tokens(height, width))

    def shrunk(self, height: int, width: int) -> None:
        """Nothing is interpolated."""

    def canvas(self, height: int, width: int) -> np.ndarray[Any, Any]:
        """All tokens in one row: tiles stay tiles."""
        return self.layout(height, width)[None]

    @property
    def options(self) -> dict[str, Any]:
        """The plain keywords that build the same again: a tiling's in `config.json`."""
        return {"type": self.rule, **{k: getattr(self, k) for k in _OPTIONS[self.rule]}}

    def image_processor(self, **options: Any) -> SplitImageProcessor:
        """The image processor that cuts pictures so; `options`: how they are normalised."""
        how = {k: getattr(self, k) for k in ("tile_size", "rule", *_OPTIONS[self.rule])}
        return SplitImageProcessor(**how, **options)


@dataclass(frozen=True)
class PictureWords:
    """What a processor writes among a picture's placeholders.

    Args:
        before, after: around the whole of it (InternVL's `<img>` and `</img>`).
        tile: before each tile, `{row}` and `{column}` counted from 1. row_end: behind each row of tiles. thumbnail:
            before the thumbnail. alone: before a picture that is not cut.
    """

    before: str = ""
    tile: str = ""
    row_end: str = ""
    thumbnail: str = ""
    alone: str = ""
    after: str = ""

    def write(self, placeholder: str, layout: object, height: int, width: int, tokens: int) -> str:
        """A picture in a prompt. `tokens`: of all of it. `layout`: by which it is cut; None, or one whose tiles are no
        pieces of their own in a prompt, for a picture in one piece."""
        if not isinstance(layout, SplitLayout) or layout.num_pieces(height, width) == 1:
            return self.before + self.alone + placeholder * tokens + self.after
        rows, columns = layout.shape(height, width)
        piece = placeholder * layout.tile_tokens
        lines = [
            "".join(self.tile.format(row=row + 1, column=column + 1) + piece for column in range(columns))
            for row in range(rows)
        ]
        tiles = "".join(f"{line}{self.row_end}" for line in lines)
        whole = self.thumbnail + piece if layout.thumbnail else ""
        return self.before + (whole + tiles if layout.rule == "nanovlm" else tiles + whole) + self.after


class SplitImageProcessorKwargs(ImagesKwargs, total=False):
    """As in `SplitLayout`."""

    tile_size: int
    rule: str
    min_tiles: int
    max_tiles: int
    longest_side: int | None
    split: bool
    enlarge: bool
    thumbnail: bool


class SplitImageProcessor(TorchvisionBackend):
    """Pictures → `pixel_values` (tiles of all pictures, 3, S, S) and `image_sizes` (images, 2) as height, width.

    The same pixels as transformers' `GotOcr2ImageProcessor` (which InternVL has) and `Idefics3ImageProcessor`, and as
    nanoVLM's own, which resizes by PIL; torchvision rounds otherwise, and an enlarged picture differs visibly.
    """

    valid_kwargs = SplitImageProcessorKwargs
    do_resize = do_rescale = do_normalize = do_convert_rgb = True
    resample = 3
    image_mean = image_std = (0.5, 0.5, 0.5)
    tile_size, rule, min_tiles, max_tiles, split = 224, "internvl", 1, 12, True
    longest_side: int | None = None
    enlarge = thumbnail = True
    model_input_names: ClassVar[list[str]] = ["pixel_values", "image_sizes"]  # type: ignore[misc]

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> Any:  # type: ignore[override]
        kwargs.pop("do_resize", None)  # there is no one size
        return super()._validate_preprocess_kwargs(**kwargs)

    def _preprocess(  # type: ignore[override]
        self, images: list[Tensor], *, tile_size: int, rule: Rule, min_tiles: int, max_tiles: int,
        longest_side: int | None, split: bool, enlarge: bool, thumbnail: bool, resample: Any, do_rescale: bool,
        rescale_factor: float, do_normalize: bool, image_mean: list[float], image_std: list[float],
        return_tensors: str | None, **kwargs: Any,
    ) -> BatchFeature:  # fmt: skip
        layout = SplitLayout(tile_size, 1, rule, min_tiles, max_tiles, longest_side, split, enlarge, thumbnail)
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        pieces = []
        for image_CHW, size in zip(images, sizes, strict=True):
            rows, columns = layout.shape(*size)
            picture_CHW = self._resized(image_CHW, layout.first_size(*size), resample)
            resized = _resized_by_pil if rule == "nanovlm" else self._resized
            canvas_CHW = resized(picture_CHW, (rows * tile_size, columns * tile_size), resample)
            # Idefics3's thumbnail is made of the canvas, InternVL's of the picture.
            whole_CHW = canvas_CHW if rule == "idefics3" else picture_CHW
            tiles_CYXSS = canvas_CHW.unfold(1, tile_size, tile_size).unfold(2, tile_size, tile_size)
            tiles_TCSS = tiles_CYXSS.permute(1, 2, 0, 3, 4).flatten(0, 1)
            if rule == "nanovlm" and layout.num_pieces(*size) > rows * columns:  # of fractions, not of 8 bits
                thumbnail_CSS = self._resized(canvas_CHW.float(), (tile_size, tile_size), Resampling.BILINEAR)
                tiles_TCSS = torch.cat([thumbnail_CSS[None], tiles_TCSS])
            elif layout.num_pieces(*size) > rows * columns:
                thumbnail_CSS = self._resized(whole_CHW, (tile_size, tile_size), resample)
                tiles_TCSS = torch.cat([tiles_TCSS, thumbnail_CSS[None]])
            pieces.append(
                self.rescale_and_normalize(tiles_TCSS, do_rescale, rescale_factor, do_normalize, image_mean, image_std)
            )
        return BatchFeature(data={"pixel_values": torch.cat(pieces), "image_sizes": sizes}, tensor_type=return_tensors)

    def _resized(self, image_CHW: Tensor, size: tuple[int, int], resample: Any) -> Tensor:
        if tuple(image_CHW.shape[-2:]) == size:
            return image_CHW
        out: Tensor = self.resize(image=image_CHW, size=SizeDict(height=size[0], width=size[1]), resample=resample)
        return out


def _resized_by_pil(image_CHW: Tensor, size: tuple[int, int], resample: int) -> Tensor:
    """Of 8 bits, as PIL resizes pictures."""
    picture = fromarray(image_CHW.permute(1, 2, 0).cpu().numpy())
    return torch.from_numpy(np.array(picture.resize((size[1], size[0]), Resampling(resample)))).permute(2, 0, 1)


def split_layout(options: dict[str, Any], *, tile_size: int, tile_tokens: int) -> SplitLayout:
    """A layout from its `options`.

    Raises:
        OpticNerveError: other keywords, or numbers that no picture can keep.
    """
    given = dict(options)
    rule = given.pop("type")
    known = _OPTIONS[rule]
    if unknown := sorted(set(given) - set(known)):
        raise OpticNerveError(
            f"tiling of type {rule} takes no {', '.join(unknown)}; it takes {', '.join(known)}", kind="unknown-key"
        )
    made = SplitLayout(tile_size, tile_tokens, rule, **given)
    if not 1 <= made.min_tiles <= made.max_tiles or (made.longest_side or tile_size) < 1:
        raise OpticNerveError(
            f"tiling: {made.min_tiles} to {made.max_tiles} tiles, a longest side of {made.longest_side} px: numbers "
            "are from 1, and the first is at most the second",
            kind="out-of-range",
        )
    if rule == "nanovlm" and made.split and ((made.longest_side or 1) % tile_size):
        raise OpticNerveError(
            f"tiling of type nanovlm wants a longest_side of whole tiles ({tile_size} px), not {made.longest_side}",
            kind="out-of-range",
        )
    return made


def is_split(options: dict[str, Any] | None) -> bool:
    """Whether a tiling's options are these, not a canvas's."""
    return (options or {}).get("type") in get_args(Rule)


def normalising(own: BaseImageProcessor) -> dict[str, Any]:
    """How an image processor normalises, for one that cuts tiles.

    Raises:
        OpticNerveError: it says nothing of mean and deviation.
    """
    if getattr(own, "image_mean", None) is None or getattr(own, "image_std", None) is None:
        raise OpticNerveError(
            f"tiling needs an image processor with image_mean and image_std; {type(own).__name__} has none",
            kind="unsupported",
        )
    kept = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample", "do_convert_rgb")
    return {k: v for k in kept if (v := getattr(own, k, None)) is not None}
