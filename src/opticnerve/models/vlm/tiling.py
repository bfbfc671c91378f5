"""High-resolution tiling with a thumbnail: LLaVA-NeXT's "anyres" (Liu et al. 2024, blog post "LLaVA-NeXT: Improved
reasoning, OCR, and world knowledge").

A picture is resized and padded to the best of a few *pinpoints* (canvas sizes), the canvas is cut into tiles as large
as the encoder's input, and the whole picture, squashed to one tile, goes first as a thumbnail. Encoder and connector
work tile by tile; afterwards the tiles' soft tokens are put in order, row by row over the whole canvas, as a reader
would scan it.

    layout of one picture:  thumbnail's g × g tokens | row 1 of the canvas, newline | row 2, newline | …

The order is a table of indices (`TileLayout.layout`), from which everything follows: how many placeholders the
processor writes (its length) and what the model puts there (one look-up). LLaVA-OneVision (Li et al. 2024, section 3.2)
adds a budget: the map of a canvas with more tokens than `max_tiles` tiles have is interpolated down to it first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from math import sqrt
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BaseImageProcessor, BatchFeature, LlavaNextImageProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessorKwargs
from transformers.models.llava_next.modeling_llava_next import unpad_image

from opticnerve.common.on_host import on_host, sent
from opticnerve.models.vlm.splitting import SplitImageProcessor, SplitLayout, is_split, normalising, split_layout
from opticnerve.types import Features, OpticNerveError

# LLaVA-NeXT's canvases in tiles: height × width.
SHAPES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
NEWLINE = -1


@dataclass(frozen=True)
class TileLayout:
    """Which tiles a picture is cut into, and in which order their tokens are read. Plain numbers, no tensors.

    Args:
        tile_size: side of a tile in pixels: the encoder's input.
        tile_tokens: soft tokens of one tile, after the connector.
        pinpoints: canvas sizes (height, width) in pixels, multiples of `tile_size`.
        grid: side of the map that a tile's tokens form, or None where they form none.
        unpad: leave out the tokens that see nothing but padding.
        newline: end each row of the canvas with a learnt token.
        thumbnail: the whole picture as the first tile.
        max_tiles: a canvas keeps at most the tokens of so many tiles, and no more than a tenth of a side above (None:
            all of them); its map is interpolated to fewer where it has more.
    """

    tile_size: int
    tile_tokens: int
    pinpoints: tuple[tuple[int, int], ...]
    grid: int | None
    unpad: bool
    newline: bool
    thumbnail: bool
    max_tiles: int | None = None

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles, without the thumbnail, of the canvas that keeps most of a picture's pixels."""
        canvas_height, canvas_width = select_best_resolution((height, width), list(self.pinpoints))
        return canvas_height // self.tile_size, canvas_width // self.tile_size

    def num_pieces(self, height: int, width: int) -> int:
        """Tiles of a picture of `height` × `width` pixels, thumbnail included."""
        rows, columns = self.shape(height, width)
        return rows * columns + self.thumbnail

    def num_tokens(self, height: int, width: int) -> int:
        """Soft tokens of one picture: the placeholders that the processor writes."""
        return len(self.layout(height, width))

    @property
    def max_tokens(self) -> int:
        """The most soft tokens that any picture can take."""
        side, budget = self.grid or 0, 1.21 * (self.max_tiles or np.inf) * self.tile_tokens
        shapes = [(h // self.tile_size, w // self.tile_size) for h, w in self.pinpoints]
        return self.thumbnail * self.tile_tokens + max(
            int(min(r * c * self.tile_tokens, budget)) + r * side * self.newline for r, c in shapes
        )

    @lru_cache(maxsize=4096)  # noqa: B019  (frozen and small: a few of them per process)
    def layout(self, height: int, width: int) -> np.ndarray[Any, Any]:
        """The order in which a picture's tokens are read: (tokens,) int64, read-only.

        Each entry counts through the tokens of the picture's tiles (`tile · tile_tokens + token`) and, behind those, of
        its map where it is `shrunk`; or it is `NEWLINE`.
        """
        first = self.tile_tokens * self.thumbnail
        canvas_HW = self.canvas(height, width)
        if (shape := self.shrunk(height, width)) is not None:
            beyond = self.num_pieces(height, width) * self.tile_tokens
            canvas_HW = beyond + np.arange(shape[0] * shape[1]).reshape(shape)
        if self.newline:
            canvas_HW = np.pad(canvas_HW, ((0, 0), (0, 1)), constant_values=NEWLINE)
        order = np.concatenate([np.arange(first), canvas_HW.reshape(-1)])
        order.setflags(write=False)
        return order

    @property
    def options(self) -> dict[str, Any]:
        """The plain keywords that build the same again: a tiling's in `config.json`."""
        pinpoints = [list(p) for p in self.pinpoints]
        options = {
            "pinpoints": pinpoints, "unpad": self.unpad, "newline": self.newline, "thumbnail": self.thumbnail,
        }  # fmt: skip
        return options if self.max_tiles is None else {**options, "max_tiles": self.max_tiles}

    def image_processor(self, **options: Any) -> TilingImageProcessor:
        """The image processor that cuts pictures so; `options`: how they are normalised."""
        side = {"height": self.tile_size, "width": self.tile_size}
        options |= {"size": side, "crop_size": side, "thumbnail": self.thumbnail}
        return TilingImageProcessor(image_grid_pinpoints=self.options["pinpoints"], **options)

    def canvas(self, height: int, width: int) -> np.ndarray[Any, Any]:
        """The canvas's tokens as their places in the picture have them: (rows, columns), entries as in `layout`; a
        single row where a tile's tokens form no map."""
        rows, columns = self.shape(height, width)
        order = self.tile_tokens * self.thumbnail + np.arange(rows * columns * self.tile_tokens)
        if (g := self.grid) is None:
            return order[None]
        # Tile by tile → row by row over the whole canvas.
        canvas_HW = order.reshape(rows, columns, g, g).transpose(0, 2, 1, 3).reshape(rows * g, columns * g)
        if self.unpad:
            # transformers' own rounding; it only slices, so that a table of indices serves as well as a tensor.
            seen_HW = unpad_image(canvas_HW[None], (height, width))[0]
            # Of a picture as thin as a hair it may leave nothing; LLaVA-NeXT has the thumbnail still.
            canvas_HW = seen_HW if seen_HW.size or self.thumbnail else canvas_HW
        return canvas_HW

    def shrunk(self, height: int, width: int) -> tuple[int, int] | None:
        """Rows and columns that the canvas's map is interpolated to; None where it is within the budget.

        Source: transformers' `LlavaOnevisionModel.pack_image_features`, with its slack of a tenth.
        """
        if self.max_tiles is None:
            return None
        rows, columns = self.canvas(height, width).shape
        ratio = sqrt(rows * columns / (self.max_tiles * self.tile_tokens))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else None


class Tiling(nn.Module):
    """The tiles' place in a tower: counts tokens for the processor, puts them in order for the model.

    Holds the `newline` embedding (language width) where there is one, drawn as LLaVA-NeXT draws it.
    """

    newline: nn.Parameter | None

    def __init__(self, spec: TileLayout | SplitLayout, language_width: int) -> None:
        super().__init__()
        self.spec, self.tiles, self.count = spec, spec.num_pieces, spec.num_tokens
        row_end_D = torch.randn(language_width) / language_width**0.5 if spec.newline else None
        self.register_parameter("newline", None if row_end_D is None else nn.Parameter(row_end_D))

    @classmethod
    def from_options(
        cls, options: dict[str, Any], *, tile_size: int, grid: int | None, language_width: int,
        tile_tokens: int | None = None,
    ) -> Tiling:  # fmt: skip
        """A tiling from a recipe's `tiling: {pinpoints, unpad, newline, thumbnail}` (all of them optional).

        Args:
            tile_size: the encoder's `image_size`.
            grid: side of the map that the connector's tokens form; None where they form none (qformer, resampler).
            tile_tokens: the connector's `num_tokens`; needed where there is no grid.

        Raises:
            OpticNerveError: unknown options, pinpoints that are not multiples of the tile, or `unpad` or `newline`
            without a map.
        """
        if is_split(options):
            if (count := tile_tokens or (grid or 0) ** 2) < 1:
                raise OpticNerveError(
                    "a tiling without a grid needs tile_tokens: the connector's num_tokens", kind="missing-field"
                )
            return cls(split_layout(options, tile_size=tile_size, tile_tokens=count), language_width)
        options = {k: v for k, v in options.items() if k != "type"}
        known = [f.name for f in fields(TileLayout) if f.name not in ("tile_size", "tile_tokens", "grid")]
        if unknown := sorted(set(options) - set(known)):
            raise OpticNerveError(
                f"tiling takes no {', '.join(unknown)}; it takes {', '.join(known)}", kind="unknown-key"
            )
        given = {k: v for k, v in options.items() if v is not None}
        for flag in ("unpad", "newline", "thumbnail"):
            if not isinstance(given.get(flag, True), bool):
                raise OpticNerveError(f"tiling.{flag} is true or false, not {given[flag]!r}", kind="wrong-type")
            if grid is None and flag != "thumbnail" and given.get(flag):
                raise OpticNerveError(
                    f"tiling.{flag} needs a map of tokens, and this connector's tokens form none; leave it out, or "
                    "take a connector that keeps the map (mlp, linear, pixel_shuffle, abstractor)",
                    kind="unsupported",
                )
        if grid is not None:
            if tile_tokens not in (None, grid**2):
                raise OpticNerveError(
                    f"{tile_tokens} tokens of a tile form no map of {grid} × {grid}", kind="wrong-shape"
                )
            tile_tokens = grid**2
        if tile_tokens is None:
            raise OpticNerveError(
                "a tiling without a grid needs tile_tokens: the connector's num_tokens", kind="missing-field"
            )
        defaults = {"unpad": grid is not None, "newline": grid is not None, "thumbnail": True}
        if (most := given.get("max_tiles")) is not None:
            if isinstance(most, bool) or not isinstance(most, int) or most < 1:
                raise OpticNerveError(f"tiling.max_tiles is a whole number from 1, not {most!r}", kind="out-of-range")
            if grid is None:
                raise OpticNerveError(
                    "tiling.max_tiles interpolates a map of tokens, and this connector's tokens form none; leave it "
                    "out, or take a connector that keeps the map (mlp, linear, pixel_shuffle, abstractor)",
                    kind="unsupported",
                )
        given["pinpoints"] = _pinpoints(given.get("pinpoints"), tile_size)
        return cls(TileLayout(tile_size, tile_tokens, grid=grid, **{**defaults, **given}), language_width)

    @property
    def options(self) -> dict[str, Any]:
        """The plain keywords that build the same tiling again: they go into `config.json`."""
        return self.spec.options

    def arrange(self, features: Features, image_sizes: Tensor | Iterable[Sequence[int]]) -> Features:
        """The tiles' tokens as one row a picture.

        Args:
            features: (tiles of all pictures, tile_tokens, D), in order, as the connector gave them.
            image_sizes: (images, 2), height and width of each picture before it was cut.

        Returns:
            `Features` of (images, N, D), N the most tokens of any picture; the others' rows end in zeros, masked out.

        Raises:
            ValueError: the tiles given are not those that the sizes ask for; both numbers are named.
        """
        tokens_TMD, mask_TM = features.tokens_BND, features.mask_BN
        sizes = [
            (int(h), int(w))
            for h, w in (on_host(image_sizes).tolist() if isinstance(image_sizes, Tensor) else image_sizes)
        ]
        tiles = [self.tiles(*size) for size in sizes]
        if sum(tiles) != tokens_TMD.shape[0] or self.spec.tile_tokens != tokens_TMD.shape[1]:
            raise ValueError(
                f"image_sizes {sizes} ask for {sum(tiles)} tiles of {self.spec.tile_tokens} tokens; "
                f"given are {tokens_TMD.shape[0]} of {tokens_TMD.shape[1]}"
            )
        counts = [count * self.spec.tile_tokens for count in tiles]
        flat_KD, seen_K = tokens_TMD.flatten(0, 1), mask_TM.flatten()
        if any(self.spec.shrunk(*size) for size in sizes):
            flat_KD, seen_K, counts = self._with_shrunk(flat_KD, seen_K, sizes, counts)
        row_end, nothing = len(flat_KD), len(flat_KD) + 1
        zeros_D = flat_KD.new_zeros(flat_KD.shape[-1])
        row_end_D = zeros_D if self.newline is None else self.newline.to(flat_KD)
        flat_KD = torch.cat([flat_KD, row_end_D[None], zeros_D[None]])
        seen_K = torch.cat([seen_K, seen_K.new_ones(1), seen_K.new_zeros(1)])
        layouts = [self.spec.layout(*size) for size in sizes]
        index_BN = np.full((len(sizes), max(map(len, layouts), default=0)), nothing)
        first = 0
        for row_N, layout, count in zip(index_BN, layouts, counts, strict=True):
            row_N[: len(layout)] = np.where(layout == NEWLINE, row_end, layout + first)
            first += count
        index = sent(torch.from_numpy(index_BN), flat_KD.device)
        return Features(flat_KD[index], seen_K[index])

    def _with_shrunk(
        self, flat_KD: Tensor, seen_K: Tensor, sizes: Sequence[tuple[int, int]], counts: Sequence[int]
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Behind each picture's tokens (`counts` of them) those of its map where it is `shrunk`; the new counts."""
        tokens, seen, lengths = [], [], []
        for own_KD, own_K, size in zip(flat_KD.split(list(counts)), seen_K.split(list(counts)), sizes, strict=True):
            lengths.append(len(own_KD))
            tokens.append(own_KD)
            seen.append(own_K)
            if (shape := self.spec.shrunk(*size)) is not None:
                map_HWD = own_KD[sent(torch.from_numpy(self.spec.canvas(*size).copy()), own_KD.device)]
                small_DHW = F.interpolate(map_HWD.permute(2, 0, 1)[None], shape, mode="bilinear")[0]
                tokens.append(small_DHW.flatten(1).T)
                seen.append(own_K.new_ones(shape[0] * shape[1]))
                lengths[-1] += shape[0] * shape[1]
        return torch.cat(tokens), torch.cat(seen), lengths

    def image_processor(self, own: BaseImageProcessor) -> TilingImageProcessor | SplitImageProcessor:
        """The image processor that cuts pictures into this tiling's tiles, normalised as the encoder's `own` does.

        How `own` makes a picture square (crop, pad, squash) does not matter: tiles are square already, and the
        thumbnail is squashed, as in LLaVA-NeXT.

        Raises:
            OpticNerveError: `own` says nothing of mean and deviation.
        """
        return self.spec.image_processor(**normalising(own))


class TilingImageProcessorKwargs(LlavaNextImageProcessorKwargs, total=False):
    """`thumbnail`: whether the whole picture, squashed to one tile, goes first."""

    thumbnail: bool


class TilingImageProcessor(LlavaNextImageProcessor):
    """Pictures → `pixel_values` (tiles of all pictures, 3, S, S) and `image_sizes` (images, 2) as height, width.

    LLaVA-NeXT's own, its tiles laid flat instead of filled up with zeros to (images, most tiles, 3, S, S).
    `image_grid_pinpoints`, `crop_size` (the tile), mean, deviation and resampling are as there.
    """

    valid_kwargs = TilingImageProcessorKwargs
    thumbnail = True

    def _preprocess(  # type: ignore[override]
        self, images: list[Any], *, thumbnail: bool, return_tensors: str | None, **kwargs: Any
    ) -> BatchFeature:
        tiled = super()._preprocess(images, **{**kwargs, "do_pad": False, "return_tensors": None})
        tiles = [t if thumbnail else t[1:] for t in tiled["pixel_values"]]
        data = {"pixel_values": torch.cat(tiles), "image_sizes": tiled["image_sizes"]}
        return BatchFeature(data=data, tensor_type=return_tensors)


def layout_of(saved: dict[str, Any]) -> TileLayout | SplitLayout:
    """A layout from the dict that a processor's file holds."""
    if "rule" in saved:
        return SplitLayout(**{k: v for k, v in saved.items() if k in SplitLayout.__dataclass_fields__})
    return TileLayout(**{**saved, "pinpoints": tuple(tuple(p) for p in saved["pinpoints"])})


def _pinpoints(given: Any, tile_size: int) -> tuple[tuple[int, int], ...]:
    """Canvas sizes, checked; LLaVA-NeXT's five at this tile size by default."""
    if given is None:
        return tuple((rows * tile_size, columns * tile_size) for rows, columns in SHAPES)
    pairs = [tuple(p) if isinstance(p, Sequence) and not isinstance(p, str) else p for p in given]
    if not pairs:
        raise OpticNerveError("tiling.pinpoints is empty; name at least one canvas, such as [672, 672]", kind="empty")
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
            raise OpticNerveError(
                f"tiling.pinpoints wants pairs [height, width] of whole numbers, not {pair!r}", kind="wrong-type"
            )
        if any(n % tile_size for n in pair):
            raise OpticNerveError(
                f"tiling.pinpoints: {list(pair)} is no multiple of the tile, {tile_size} px; "
                f"the nearest is {[max(1, round(n / tile_size)) * tile_size for n in pair]}",
                kind="wrong-shape",
            )
    return tuple(pairs)
