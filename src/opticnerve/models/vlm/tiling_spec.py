"""Which tiles a picture is cut into, and in which order their tokens are read; see `tiling`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

# LLaVA-NeXT's canvases in tiles: height × width.
SHAPES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


NEWLINE = -1


@dataclass(frozen=True)
class TilingSpec:
    """Which tiles a picture is cut into, and in which order their tokens are read. Plain numbers, no tensors.

    Args:
        tile_size: side of a tile in pixels: the encoder's input.
        tile_tokens: soft tokens of one tile, after the connector.
        pinpoints: canvas sizes (height, width) in pixels, multiples of `tile_size`.
        grid: side of the map that a tile's tokens form, or None where they form none.
        unpad: leave out the tokens that see nothing but padding.
        newline: end each row of the canvas with a learnt token.
        thumbnail: the whole picture as the first tile.
    """

    tile_size: int
    tile_tokens: int
    pinpoints: tuple[tuple[int, int], ...]
    grid: int | None
    unpad: bool
    newline: bool
    thumbnail: bool

    def best_resolution(self, height: int, width: int) -> tuple[int, int]:
        """The canvas (height, width) that keeps most of a picture's pixels and wastes least."""
        best: tuple[int, int] = select_best_resolution((height, width), list(self.pinpoints))
        return best

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles that a picture of `height` × `width` pixels is cut into, without the thumbnail."""
        canvas_height, canvas_width = self.best_resolution(height, width)
        return canvas_height // self.tile_size, canvas_width // self.tile_size

    def num_tiles(self, height: int, width: int) -> int:
        """Tiles of one picture, thumbnail included."""
        rows, columns = self.shape(height, width)
        return rows * columns + self.thumbnail

    def num_tokens(self, height: int, width: int) -> int:
        """Soft tokens of one picture: the placeholders that the processor writes."""
        return len(self.layout(height, width))

    @property
    def max_tokens(self) -> int:
        """The most soft tokens that any picture can take."""
        side = self.grid or 0
        shapes = [(h // self.tile_size, w // self.tile_size) for h, w in self.pinpoints]
        return max((r * c + self.thumbnail) * self.tile_tokens + r * side * self.newline for r, c in shapes)

    def layout(self, height: int, width: int) -> np.ndarray[Any, Any]:
        """The order in which a picture's tokens are read: (tokens,) int64, read-only.

        Each entry counts through the tokens of the picture's tiles (`tile · tile_tokens + token`), or is `NEWLINE`.
        """
        return _layout(self, int(height), int(width))


@lru_cache(maxsize=4096)
def _layout(spec: TilingSpec, height: int, width: int) -> np.ndarray[Any, Any]:
    rows, columns = spec.shape(height, width)
    first = spec.tile_tokens * spec.thumbnail
    order = first + np.arange(rows * columns * spec.tile_tokens)
    if spec.grid is not None:
        g = spec.grid
        # Tile by tile → row by row over the whole canvas.
        canvas_HW = order.reshape(rows, columns, g, g).transpose(0, 2, 1, 3).reshape(rows * g, columns * g)
        if spec.unpad:
            # transformers' own rounding; it only slices, so that a table of indices serves as well as a tensor.
            seen_HW = unpad_image(canvas_HW[None], (height, width))[0]
            # Of a picture as thin as a hair it may leave nothing; that is LLaVA-NeXT's, which has the thumbnail still.
            canvas_HW = seen_HW if seen_HW.size or spec.thumbnail else canvas_HW
        if spec.newline:
            canvas_HW = np.pad(canvas_HW, ((0, 0), (0, 1)), constant_values=NEWLINE)
        order = canvas_HW.reshape(-1)
    order = np.concatenate([np.arange(first), order])
    order.setflags(write=False)
    return order
