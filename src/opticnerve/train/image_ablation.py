"""After a stage: does the loss depend on the picture? The same samples are read with their own pictures and with one
another's; a model that looks is worse at the latter."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch

from opticnerve.objectives.base import Objective
from opticnerve.train.sampler import StageSampler
from opticnerve.types import DataError

if TYPE_CHECKING:
    from opticnerve.data.encode.packing import Row

SAMPLES, TOKENS = 16, 3_000
"""At most so many of the stage's first samples, and about so many tokens: it shall cost seconds, not minutes."""
FEWEST = 4
_Z = 1.96


@torch.no_grad()
def image_use(objective: Objective, sampler: StageSampler) -> dict[str, Any] | None:
    """The mean loss a token of the objective's model on some of the stage's samples, with their own picture and with
    another's.

    Every process computes the same. None where the question makes no sense: fewer than `FEWEST` samples with one
    picture of their own each, pictures whose number of tokens differs (tiles, `fit: native`), or an objective that
    reads no rows of tokens.

    Returns: `n`, `own`, `other` (nats a token, means over samples), `other_minus_own`, its `ci95` (paired, normal).
    """
    tower = objective.model.towers.get("image")
    if sampler.own_collate is not None or tower is None or getattr(tower, "layout", None) is not None:
        return None
    rows = _rows(sampler)
    if len(rows) < FEWEST:
        return None
    objective.model.eval()
    own, other = [], []
    for k, row in enumerate(rows):
        swapped = replace(row, images=rows[k - 1].images)  # in a circle, everybody's neighbour is somebody else
        own.append(_loss(objective, sampler, row))
        other.append(_loss(objective, sampler, swapped))
    gaps = [b - a for a, b in zip(own, other, strict=True)]
    mean, half = fmean(gaps), _Z * stdev(gaps) / math.sqrt(len(gaps))
    return {
        "n": len(rows), "own": fmean(own), "other": fmean(other), "other_minus_own": mean,
        "ci95": [mean - half, mean + half],
    }  # fmt: skip


def _rows(sampler: StageSampler) -> list[Any]:
    """Rows of one sample each, with one picture that no other of them shows."""
    found: list[Any] = []
    shown: set[Any] = set()
    tokens = 0
    for index in range(min(sampler.num_samples, 8 * SAMPLES)):
        pictures = {_key(i.source) for c in sampler.drawn(index) for i in c.images}
        if len(pictures) != 1 or pictures & shown:
            continue
        try:
            row = sampler.row(index)
        except DataError:  # it is gone since it was trained on, or was left out then, too
            continue
        if len(row.images) != 1:
            continue
        if (found and tokens + len(row) > TOKENS) or len(found) == SAMPLES:
            break
        shown |= pictures
        tokens += len(row)
        found.append(row)
    return found


def _loss(objective: Objective, sampler: StageSampler, row: Row) -> float:
    device = next(objective.parameters()).device
    loss, count = objective(sampler.collate([row]).to(device))
    return float(loss) / max(1, int(count))


def _key(source: object) -> Any:
    return id(source) if isinstance(source, PIL.Image.Image) else source
