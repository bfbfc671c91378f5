"""Before the first step: let fresh connectors measure the features they will get, and the embeddings they must
resemble."""

from __future__ import annotations

from typing import Any

import torch

from opticnerve.models.tower import MEDIA_INPUT
from opticnerve.train.visits import Visits


@torch.no_grad()
def calibrate(model: Any, visits: Visits, *, pieces: int = 64) -> None:
    """Set the calibration buffers of every connector that wants it and has none, on the stage's first media."""
    waiting = {
        m: t for m, t in model.towers.items() if t.connector.calibrate_allowed and not bool(t.connector.calibrated)
    }
    found: dict[str, list[torch.Tensor]] = {m: [] for m in waiting}
    for index in range(len(visits) if waiting else 0):
        batch = visits[index]
        media = getattr(batch, "media", vars(batch))
        for modality in waiting:
            pieces_seen = media.get(MEDIA_INPUT[modality])
            found[modality] += () if pieces_seen is None else pieces_seen
        if all(len(seen) >= pieces for seen in found.values()):
            break
    weights = model.get_input_embeddings().weight
    for modality, tower in waiting.items():
        if found[modality]:
            _measure(tower, torch.stack(found[modality][:pieces]), float(weights.float().std()))


def _measure(tower: Any, media: torch.Tensor, embedding_std: float) -> None:
    connector = tower.connector
    dtype = next(connector.parameters()).dtype
    features = tower.encode(media)
    text: list[torch.Tensor] = []
    if tower.wants_text:
        # One word stands for every question: what is measured is the scale of what comes out.
        word = torch.zeros(len(features.tokens_BND), 1, dtype=torch.long, device=features.tokens_BND.device)
        text = [word, torch.ones_like(word)]
    # Measured in float32: a deviation over bf16 sums would be rough.
    connector.float()
    connector.calibrate(type(features)(features.tokens_BND.float(), features.mask_BN), embedding_std, *text)
    connector.to(dtype)
