"""What formats with a vision encoder and soft tokens in the text take, LLaVA and its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

VISION_ENCODERS = ("clip_vision_model", "siglip_vision_model")


def encoder_refusals(model: Any, engine: str, vision_encoders: Sequence[str] = VISION_ENCODERS) -> list[str]:
    """Why the towers and their fusion are no vision encoder of the given families with soft tokens in the text; empty
    if they are."""
    reasons, towers = [], model.config.towers
    if "image" not in towers:
        return [f"it has no vision encoder, and {engine} is one with a vision encoder"]
    if others := sorted(set(towers) - {"image"}):
        reasons.append(
            f"it has an {others[0]} tower, and {engine} has a vision encoder alone; nearest: model.image alone"
        )
    spec = towers["image"]
    if (fusion := spec["fusion"]["type"]) != "splice":
        reasons.append(
            f"its fusion is {fusion}, {engine} has soft tokens in the text; nearest: fusion {{type: splice}}"
        )
    if "tiling" in spec:
        reasons.append(f"it cuts pictures into tiles, {engine} shows each whole; nearest: leave out tiling")
    kind = spec["encoder"]["type"]
    if kind != "hf_vision":
        reasons.append(f"its encoder is {kind}; nearest: encoder {{type: hf_vision}} with a {vision_encoders[-1]}")
    elif (family := spec["encoder"]["architecture"]["model_type"]) not in vision_encoders:
        reasons.append(
            f"its vision encoder is a {family}, {engine} is served with {' or '.join(vision_encoders)}; nearest: "
            f"one of these"
        )
    return reasons


def connector_matrices(connector: Any) -> tuple[nn.Linear, nn.Linear]:
    """The first and the last matrix of a linear or mlp connector, or of a pixel shuffle."""
    layers = [m for m in connector.modules() if isinstance(m, nn.Linear)]
    return layers[0], layers[-1]
