"""Before the first step: let fresh connectors measure the features they will get, and the embeddings they must
resemble."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from opticnerve.encoders.native import first, join_features
from opticnerve.fusion.base import words_of
from opticnerve.models.vlm.tower import MEDIA_INPUT, Tower, placed_like
from opticnerve.train.sampler import StageSampler
from opticnerve.types import Features

if TYPE_CHECKING:
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration


@torch.no_grad()
def calibrate(model: OpticNerveForConditionalGeneration, sampler: StageSampler, *, pieces: int = 64) -> None:
    """Set the calibration buffers of every connector that wants it and has none, on the stage's first media.

    Models without connectors are left as they are.
    """
    waiting = {
        m: t for m, t in model.towers.items() if t.connector.calibrate_allowed and not bool(t.connector.calibrated)
    }
    if not waiting:
        return
    found: dict[str, list[Features]] = {m: [] for m in waiting}
    for index in range(len(sampler)):
        batch = sampler[index]
        media = getattr(batch, "media", vars(batch))
        for modality, tower in waiting.items():
            features, given = media.get(f"{modality}_features"), media.get(MEDIA_INPUT[modality])
            if features is not None:
                found[modality].append(features)
            elif given is not None:
                found[modality].append(tower.encode(given, media.get("image_sizes")))
        if all(sum(len(f.mask_BN) for f in seen) >= pieces for seen in found.values()):
            break
    embeddings: Any = model.get_input_embeddings()
    _, words_std = words_of(embeddings) if any(found.values()) else (None, 0.0)
    for modality, tower in waiting.items():
        if found[modality]:
            seen, device = found[modality], embeddings.weight.device
            here = [replace(f, tokens_BND=f.tokens_BND.to(device), mask_BN=f.mask_BN.to(device)) for f in seen]
            _measure(tower, first(join_features(here), pieces), words_std)


def _measure(tower: Tower, features: Features, embedding_std: float) -> None:
    connector = tower.connector
    dtype = placed_like(connector).dtype
    text: list[torch.Tensor] = []
    if tower.wants_text:
        # One word stands for every question: what is measured is the scale of what comes out.
        word = torch.zeros(len(features.tokens_BND), 1, dtype=torch.long, device=features.tokens_BND.device)
        text = [word, torch.ones_like(word)]
    # Measured in float32: a deviation over bf16 sums would be rough.
    connector.float()
    connector.calibrate(replace(features, tokens_BND=features.tokens_BND.float()), embedding_std, *text)
    connector.to(dtype)
