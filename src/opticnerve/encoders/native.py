"""Pictures at their own proportions and, within a budget of patches, at their own size.

A picture is resized to a whole number of patches each way, cut into them, and all pictures' patches lie behind one
another in one tensor: no padding anywhere, and as many soft tokens as a picture has patches. What a vision encoder
does with pictures of several shapes is its own business; padding stays inside of it, masked.

Sources: Dehghani et al. 2023, Patch n' Pack: NaViT; Tschannen et al. 2025, SigLIP 2, section 2.4.2 (NaFlex); Wang et
al. 2024, Qwen2-VL, section 2.1 (naive dynamic resolution).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches
from transformers.processing_utils import ImagesKwargs

from opticnerve.common.on_host import known, sent
from opticnerve.types import Features, OpticNerveError

Grid = tuple[int, int]
Rounding = Literal["up", "nearest"]


@dataclass(frozen=True)
class NativeLayout:
    """How many patches a picture is cut into, and how many soft tokens become of them. Plain numbers, no tensors.

    Args:
        patch_size: side of a patch in pixels.
        min_patches, max_patches: the budget. A picture within it keeps its size (but for the rounding); one of more is
            made smaller until it fits, one of fewer larger, to at most `min_patches`. As SigLIP 2 has it the two are
            the same: every picture fills the budget.
        multiple: sides are multiples of so many patches (2 where an encoder merges squares of 2 × 2).
        rounding: of a side to whole patches: "up" (SigLIP 2's own processor, Pixtral's) or "nearest" (Qwen2-VL's; where
            a picture is so thin that this would break the budget, "up").
        max_side: rows or columns of patches at most; a longer picture is made smaller first (Pixtral's longest edge).
        pool: rows and columns of patches that become one soft token, in the encoder and in the connector together.
        tokens: soft tokens of every picture, where the connector gives a fixed number.
    """

    patch_size: int
    min_patches: int
    max_patches: int
    multiple: int = 1
    rounding: Rounding = "up"
    max_side: int | None = None
    pool: tuple[int, int] = (1, 1)
    tokens: int | None = None

    def __post_init__(self) -> None:
        # As a file holds it: a list, or (before rectangles) the side of a square.
        given: object = self.pool
        object.__setattr__(self, "pool", (given, given) if isinstance(given, int) else tuple(self.pool))
        least = self.multiple**2
        if not least <= self.max_patches or not 1 <= self.min_patches <= self.max_patches:
            raise OpticNerveError(
                f"a budget of {self.min_patches} to {self.max_patches} patches (min_patches, max_patches): a picture "
                f"takes at least {least}, and the first is at most the second",
                kind="out-of-range",
            )

    @lru_cache(maxsize=4096)  # noqa: B019  (frozen and small: a few of them per process)
    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of patches of a picture of `height` × `width` pixels."""
        side, area = self.patch_size * self.multiple, self.patch_size**2
        if self.max_side is not None and (ratio := max(height, width) / (self.max_side * self.patch_size)) > 1:
            height, width = max(1, int(height / ratio)), max(1, int(width / ratio))
        if self.rounding == "nearest" and max(height, width) <= 200 * min(height, width):
            size = smart_resize(height, width, side, self.min_patches * area, self.max_patches * area)
            if size[0] * size[1] <= self.max_patches * area:
                return size[0] // self.patch_size, size[1] // self.patch_size
        squares = -(-height // side) * -(-width // side)
        most, least = (n // self.multiple**2 for n in (self.max_patches, self.min_patches))
        size = (-(-height // side) * side, -(-width // side) * side)
        if not least <= squares <= most:
            bound = most if squares > most else max(least, 1)
            size = get_image_size_for_max_num_patches(height, width, side, bound)
        # (A thin picture that is made larger may grow beyond the longest side.)
        most = self.max_side or self.max_patches
        return min(size[0] // self.patch_size, most), min(size[1] // self.patch_size, most)

    def num_pieces(self, height: int, width: int) -> int:
        """Patches of a picture: rows of `pixel_values`."""
        rows, columns = self.grid(height, width)
        return rows * columns

    def num_tokens(self, height: int, width: int) -> int:
        """Soft tokens of one picture: the placeholders that the processor writes."""
        return self.tokens_of(*self.grid(height, width))

    def tokens_of(self, rows: int, columns: int) -> int:
        """Soft tokens of so many patches."""
        return self.tokens if self.tokens is not None else -(-rows // self.pool[0]) * -(-columns // self.pool[1])

    @property
    def max_tokens(self) -> int:
        """The most soft tokens that any picture can take."""
        return self.num_tokens(*self.costliest)

    @property
    def costliest(self) -> tuple[int, int]:
        """Height and width in pixels of a picture that takes the most soft tokens."""
        step, most, longest = self.multiple, self.max_patches, self.max_side or self.max_patches
        shorter = range(step, min(most // step, longest) + 1, step)
        grids = ((rows, min(most // rows, longest) // step * step) for rows in shorter)
        rows, columns = max(grids, key=lambda grid: self.tokens_of(*grid))
        return rows * self.patch_size, columns * self.patch_size

    @property
    def largest(self) -> Grid:
        """The grid of a large square picture, which is what a cost is counted for."""
        side = 1000 * self.patch_size
        return self.grid(side, side)


def pooled_layout(layout: NativeLayout, pool: int) -> NativeLayout:
    """The same where squares of `pool` by `pool` soft tokens become one."""
    rows, columns = layout.pool
    return replace(layout, pool=(rows * pool, columns * pool))


class NativeImageProcessorKwargs(ImagesKwargs, total=False):
    """As in `NativeLayout`."""

    patch_size: int
    min_patches: int
    max_patches: int
    multiple: int
    rounding: str
    max_side: int | None


class NativeImageProcessor(TorchvisionBackend):
    """Pictures → `pixel_values` (patches of all pictures, p · p · 3), in raster order and within a patch as
    `cut_patches` has it, and `image_sizes` (images, 2): each picture's height and width before it was resized."""

    valid_kwargs = NativeImageProcessorKwargs
    do_resize = do_rescale = do_normalize = do_convert_rgb = True
    resample = 3
    image_mean = image_std = (0.5, 0.5, 0.5)
    patch_size, min_patches, max_patches, multiple, rounding = 16, 1, 256, 1, "up"
    max_side: int | None = None
    LAYOUT: ClassVar = ("patch_size", "min_patches", "max_patches", "multiple", "rounding", "max_side")
    model_input_names: ClassVar[list[str]] = ["pixel_values", "image_sizes"]  # type: ignore[misc]

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> Any:  # type: ignore[override]
        kwargs.pop("do_resize", None)  # there is no one size
        return super()._validate_preprocess_kwargs(**kwargs)

    def _preprocess(  # type: ignore[override]
        self, images: list[Tensor], *, patch_size: int, min_patches: int, max_patches: int, multiple: int,
        rounding: Rounding, max_side: int | None, resample: Any, do_rescale: bool, rescale_factor: float,
        do_normalize: bool, image_mean: list[float], image_std: list[float], return_tensors: str | None, **kwargs: Any,
    ) -> BatchFeature:  # fmt: skip
        layout = NativeLayout(patch_size, min_patches, max_patches, multiple, rounding, max_side)
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        patches = []
        for image_CHW, size in zip(images, sizes, strict=True):
            height, width = (n * patch_size for n in layout.grid(*size))
            pixels_CHW: Tensor = self.resize(
                image=image_CHW, size=SizeDict(height=height, width=width), resample=resample
            )
            pixels_CHW = self.rescale_and_normalize(
                pixels_CHW, do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
            patches.append(cut_patches(pixels_CHW[None], patch_size)[0])
        return BatchFeature(data={"pixel_values": torch.cat(patches), "image_sizes": sizes}, tensor_type=return_tensors)


# -- pictures of several shapes before an encoder ----------------------------------------------------------------------


def cut_patches(pixels_BCHW: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) → (B, H/p · W/p, p · p · C): patches in raster order; within one, row by row, each pixel's channels
    together (red, green, blue, red, …), as transformers' Fuyu and SigLIP 2 have it. H and W are multiples of p."""
    cut_BCYpXp = pixels_BCHW.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    out: Tensor = cut_BCYpXp.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return out


def of_pictures(patches_PE: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """The patches of each picture: (rows · columns, p · p · 3).

    Raises:
        ValueError: there are not as many as the grids ask for; both numbers are named.
    """
    counts = [rows * columns for rows, columns in grids]
    if sum(counts) != len(patches_PE):
        raise ValueError(f"pictures of {list(grids)} patches are {sum(counts)} rows; given are {len(patches_PE)}")
    return list(patches_PE.split(counts))


def collect(rows: Sequence[Tensor], grids: Sequence[Grid]) -> Features:
    """Each picture's tokens (N, D) as one batch, filled up with zeros that are masked out. `grids`: of the tokens."""
    return Features(pad_sequence(list(rows), batch_first=True), real([len(r) for r in rows], rows[0]), tuple(grids))


def join_features(parts: Sequence[Features]) -> Features:
    """Batches of pictures as one."""
    if all(part.grids is None for part in parts):
        return Features(torch.cat([p.tokens_BND for p in parts]), torch.cat([p.mask_BN for p in parts]))
    rows = [t_ND[m_N] for p in parts for t_ND, m_N in zip(p.tokens_BND, p.mask_BN, strict=True)]
    return collect(rows, [grid for p in parts for grid in p.grids or ()])


def first(features: Features, count: int) -> Features:
    """The first `count` pictures."""
    grids = None if features.grids is None else features.grids[:count]
    return Features(features.tokens_BND[:count], features.mask_BN[:count], grids)


def real(lengths: Sequence[int], like: Tensor) -> Tensor:
    """(B, longest) bool: the first so many of each row."""
    lengths_B1 = torch.tensor(lengths, device="cpu")[:, None]
    real_BN = torch.arange(max(lengths), device="cpu") < lengths_B1
    return known(sent(real_BN, like.device), real_BN)


def by_shape(
    patches_PE: Tensor, grids: Sequence[Grid], patch_size: int, see: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """What an encoder of whole pictures gives, each picture's tokens (N, D): pictures of one shape go together.

    Args:
        see: pixels (B, 3, H, W) → tokens (B, N, D).
    """
    pieces = of_pictures(patches_PE, grids)
    found: dict[int, Tensor] = {}
    for grid in dict.fromkeys(grids):
        which = [i for i, other in enumerate(grids) if other == grid]
        tokens_BND = see(join_patches(torch.stack([pieces[i] for i in which]), grid, patch_size))
        found |= dict(zip(which, tokens_BND, strict=True))
    return [found[i] for i in range(len(grids))]


def join_patches(patches_BNE: Tensor, grid: Grid, patch_size: int) -> Tensor:
    """`cut_patches` undone: (B, rows · columns, p · p · 3) → (B, 3, H, W)."""
    cut_BYXppC = patches_BNE.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)
    out: Tensor = cut_BYXppC.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return out


def check_one_shape(encoder: Any, who: str) -> None:
    """Refuse, in the name of `who`, an encoder whose pictures keep their shape."""
    if encoder.native is not None:
        raise OpticNerveError(
            f"{who} takes pictures of one shape; give the encoder fit: squash, crop or pad instead of native",
            kind="unsupported",
        )
