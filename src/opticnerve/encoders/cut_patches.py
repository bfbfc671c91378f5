"""A picture as a row of patches: what raw-patch encoders, and vision transformers that take patches, begin with."""

from __future__ import annotations

from torch import Tensor


def cut_patches(pixels_BCHW: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) → (B, H/p · W/p, p · p · C): patches in raster order; within one, row by row, each pixel's channels
    together (red, green, blue, red, …), as transformers' Fuyu and SigLIP 2 have it. H and W are multiples of p."""
    cut_BCYpXp = pixels_BCHW.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return cut_BCYpXp.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
