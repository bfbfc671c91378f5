"""Occlusion: cover a piece of the picture, and see how much less likely the answer becomes.

Source: Zeiler & Fergus 2014, Visualizing and Understanding Convolutional Networks, section 4.2. It looks at what the
model does, not at what is inside it, so it serves for any model; it is the yardstick for maps made of attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opticnerve.types import OpticNerveError


def occlusion(
    log_p: Callable[[Tensor], Tensor], pixels_CHW: Tensor, *, grid: int = 6, patch: int = 2, batch_size: int = 16
) -> Tensor:
    """How much log-probability each place of a picture is worth to each token of an answer.

    A square of `patch` × `patch` cells, in the picture's mean colour, slides over a map of `grid` × `grid` cells, one
    cell at a time and over the rim, so that every cell is covered equally often. What a cell is worth is the mean drop
    over all squares that cover it. Small squares place an object sharply and hide little of it; where the model is sure
    of its answer, they hardly move it.

    Args:
        log_p: pictures (N, C, H, W) → log-probability of each token (N, T).
        pixels_CHW: the picture as the vision encoder gets it.

    Returns: (T, grid, grid), in nats; negative where covering helps the answer.
    """
    height, width = pixels_CHW.shape[1:]
    if not 1 < grid <= min(height, width):
        raise OpticNerveError(
            f"an occlusion grid of {grid} × {grid} does not fit a picture of {height} × {width} pixels: "
            f"2 to {min(height, width)}"
        )
    if not 0 < patch < grid:
        raise OpticNerveError(f"an occlusion patch is 1 to {grid - 1} cells of the grid of {grid}, not {patch}")
    rows, columns = edges(height, grid), edges(width, grid)
    spans = [slice(max(i, 0), min(i + patch, grid)) for i in range(1 - patch, grid)]
    squares = [(i, j) for i in spans for j in spans]
    colour_C11 = pixels_CHW.mean((1, 2), keepdim=True)
    before_T = log_p(pixels_CHW[None])[0]
    sum_THW = before_T.new_zeros(len(before_T), grid, grid)
    for start in range(0, len(squares), batch_size):
        chosen = squares[start : start + batch_size]
        covered_NCHW = pixels_CHW.repeat(len(chosen), 1, 1, 1)
        for picture_CHW, (i, j) in zip(covered_NCHW, chosen, strict=True):
            picture_CHW[:, rows[i.start] : rows[i.stop], columns[j.start] : columns[j.stop]] = colour_C11
        for (i, j), drop_T in zip(chosen, before_T - log_p(covered_NCHW), strict=True):
            sum_THW[:, i, j] += drop_T[:, None, None]
    return sum_THW / patch**2


def edges(length: int, cells: int) -> list[int]:
    """Where `cells` cells of nearly equal size begin and end: `cells` + 1 pixel numbers."""
    return [round(x) for x in torch.linspace(0, length, cells + 1).tolist()]
