"""Rows of segments with and without branches, as `data.encode.packing` lays them out."""

from __future__ import annotations

import torch
from torch import Tensor


def layout(rows: list[list[list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """group, branch and positions (B, L) of rows: each a list of groups, each a list of its branches' lengths (the
    first is what they share)."""
    made = []
    for row in rows:
        group, branch = [], []
        positions: list[int] = []
        for number, lengths in enumerate(row):
            for k, length in enumerate(lengths):
                group += [number] * length
                branch += [k] * length
                positions += range(length) if k == 0 else range(lengths[0], lengths[0] + length)
        made.append((group, branch, positions))
    longest = max(len(g) for g, _, _ in made)
    padded = [
        torch.tensor([r[which] + [fill] * (longest - len(r[which])) for r in made])
        for which, fill in enumerate((-1, 0, 0))
    ]
    return padded[0], padded[1], padded[2]


ROWS = {
    "one sample a row": [[[7]], [[5]], [[6]]],
    "packed": [[[7], [3], [9], [1]], [[4], [12]]],
    "branches": [[[5, 3, 4]], [[2, 6]]],
    "branches and plain, packed": [[[5, 3, 4], [8], [2, 2, 2]], [[11], [1]]],
    "one row": [[[9]]],
}
