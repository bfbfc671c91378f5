"""Before the first step: let fresh connectors measure the features they will get, and the embeddings they must
resemble."""

from __future__ import annotations

from typing import Any

import torch

from opticnerve.models.parts import TOWERS
from opticnerve.train.visits import Visits


@torch.no_grad()
def calibrate(model: Any, visits: Visits, *, pictures: int = 64) -> None:
    """Set the calibration buffers of every connector that wants it and has none, on the stage's first pictures."""
    waiting = [
        t for t in TOWERS if hasattr(model, t) and getattr(model, t).connector.calibrate_allowed
        and not bool(getattr(model, t).connector.calibrated)
    ]  # fmt: skip
    if not waiting:
        return
    found: list[torch.Tensor] = []
    for index in range(len(visits)):
        pixels = visits[index].pixel_values
        found += [] if pixels is None else list(pixels)
        if len(found) >= pictures:
            break
    if not found:
        return
    weights = model.get_input_embeddings().weight
    tower = model.image
    features = tower.encode(torch.stack(found[:pictures]))
    connector = tower.connector
    dtype = next(connector.parameters()).dtype
    # Measured in float32: a deviation over bf16 sums would be rough.
    connector.float()
    connector.calibrate(type(features)(features.tokens_BND.float(), features.mask_BN), float(weights.float().std()))
    connector.to(dtype)
