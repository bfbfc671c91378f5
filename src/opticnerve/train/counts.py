"""What is in the batches of a step."""

from __future__ import annotations

from typing import Any

from opticnerve.models.vlm.tower import MEDIA_INPUT


def fill(batches: list[Any]) -> dict[str, float]:
    """The share of this process's positions that hold a token and no padding."""
    places = sum(getattr(b, "places", 0) for b in batches)
    return {"fill": round(sum(b.tokens for b in batches) / places, 4)} if places else {}


def media_counts(batches: list[Any]) -> list[int]:
    """Pieces of media in a step's batches, by modality."""
    given = [getattr(b, "media", {}) for b in batches]
    counts = []
    for modality, key in MEDIA_INPUT.items():
        seen = [len(media[f"{modality}_features"].mask_BN) for media in given if f"{modality}_features" in media]
        counts.append(sum(seen) + sum(len(media[key]) for media in given if key in media))
    return counts
