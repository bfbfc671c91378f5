"""Which docked models vLLM can run: decided from the configuration alone, without vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opticnerve.models.checkpoint import delta
from opticnerve.types import OpticNerveError


def check(config: Any, folder: str | Path) -> None:
    """Refuse what vLLM would run otherwise than opticnerve does.

    Args:
        config: the `OpticNerveConfig`. folder: where it came from.

    Raises:
        OpticNerveError: each reason, with the remedy.
    """
    reasons = []
    if delta.find(folder) is not None:
        reasons.append("the folder names its bases instead of holding them: opticnerve export FOLDER OUT --to merged")
    if config.lora and config.lora.get("when") == "media":
        reasons.append(
            "its adapter works beside pictures alone (lora.when: media), and vLLM's layers know no such gate; "
            "nearest: lora {when: always}"
        )
    elif config.lora:
        reasons.append("its adapter is not added into the weights: opticnerve export FOLDER OUT --to merged")
    if not config.towers:
        reasons.append("it has neither vision encoder nor audio encoder")
    for modality, spec in config.towers.items():
        fusion = spec["fusion"]["type"]
        if fusion != "splice":
            reasons.append(
                f"its {modality} fusion is {fusion}: layers within the language model, which vLLM's own class of it "
                "does not have; nearest: fusion splice"
            )
    if reasons:
        raise OpticNerveError(f"vLLM cannot run {folder}: {'; '.join(reasons)}")


def check_towers(towers: dict[str, Any]) -> None:
    """What only the built parts tell.

    Raises:
        OpticNerveError: a connector that reads the question (InstructBLIP's Q-Former).
    """
    for modality, tower in towers.items():
        if tower.wants_text:
            raise OpticNerveError(
                f"its {modality} connector reads the question beside the picture, and vLLM's multimodal inputs carry "
                "no question; nearest: connector {type: qformer} without text"
            )
