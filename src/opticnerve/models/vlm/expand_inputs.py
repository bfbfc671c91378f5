"""Several answers to one prompt: its row is repeated, and the media of a batch, which lie in one tensor, with it."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from opticnerve.models.vlm.tower import Tower

MEDIA_KEYS = ("pixel_values", "image_sizes", "input_features", "qformer_input_ids", "qformer_attention_mask")


def repeat_media(
    media: dict[str, Tensor], places: dict[str, list[int]], towers: dict[str, Tower], times: int
) -> dict[str, Tensor]:
    """Each row's media `times` over, as one block, in their order.

    Args:
        media: the model's inputs by name. places: by modality, how many placeholders each row holds.
    """
    done = {}
    for key, value in media.items():
        modality = "audio" if key == "input_features" else "image"
        tower = towers[modality]
        if tower.tiling is None:
            counts = [n // tower.num_placeholders for n in places[modality]]
        else:
            sizes = media["image_sizes"].tolist()
            counts = _images_of_rows(tower, sizes, places[modality])
            if key == "pixel_values":
                tiles = [tower.tiling.tiles(*size) for size in sizes]
                counts = [sum(tiles[a:b]) for a, b in pairwise(accumulate(counts, initial=0))]
        done[key] = torch.cat([row for row in torch.split(value, counts) for _ in range(times)])
    return done


def _images_of_rows(tower: Tower, sizes: list[list[int]], places: list[int]) -> list[int]:
    """How many pictures each row shows, from their sizes and the rows' placeholders."""
    assert tower.tiling is not None
    one_each = tower.num_placeholders == 1
    tokens = [1 if one_each else tower.tiling.count(*size) for size in sizes]
    counts, here = [], 0
    for left in places:
        first = here
        while left > 0:
            left -= tokens[here]
            here += 1
        counts.append(here - first)
    return counts
