"""Which docked models vLLM can run, and their vision and audio encoders without the language model, which vLLM loads by
itself. All of this is without vLLM."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from opticnerve.models.checkpoint import delta
from opticnerve.models.checkpoint.strict import list_problems, restore_buffers
from opticnerve.models.vlm.configuration import OpticNerveConfig
from opticnerve.models.vlm.splitting import is_split
from opticnerve.models.vlm.tower import Tower, build_tower
from opticnerve.types import OpticNerveError


def check(config: OpticNerveConfig, folder: str | Path) -> None:
    """Refuse what vLLM would run otherwise than opticnerve does, each reason with the remedy. `folder`: where the
    configuration came from."""
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
        if spec.get("lora"):
            reasons.append(
                f"its {modality} adapter is not added into the weights: opticnerve export FOLDER OUT --to merged"
            )
        fusion = spec["fusion"]["type"]
        if fusion != "splice":
            reasons.append(
                f"its {modality} fusion is {fusion}: layers within the language model, which vLLM's own class of it "
                "does not have; nearest: fusion splice"
            )
        if is_split(spec.get("tiling")):
            reasons.append(
                "its processor writes words among the tokens of a picture (InternVL's and Idefics3's way), which this "
                "plugin does not; vLLM runs the model that was imported"
            )
    if reasons:
        raise OpticNerveError(f"vLLM cannot run {folder}: {'; '.join(reasons)}", kind="unsupported")


def check_tower(modality: str, tower: Tower) -> None:
    """What only the built parts tell: a connector that reads the question (InstructBLIP's Q-Former) is refused."""
    if tower.wants_text:
        raise OpticNerveError(
            f"its {modality} connector reads the question beside the picture, and vLLM's multimodal inputs carry no "
            "question; nearest: connector {type: qformer} without text",
            kind="unsupported",
        )


class Towers(PreTrainedModel):
    """`image` and `audio` alone. It is here for `from_pretrained`: what transformers calls tensors in a file need not
    be what its modules call them, and the way between the two is its own affair."""

    config_class = OpticNerveConfig
    base_model_prefix = ""

    def __init__(self, config: OpticNerveConfig, modalities: Collection[str] = (), trusted: bool = False) -> None:
        super().__init__(config)
        sizes = language_sizes(config.text_config)
        for modality in sorted(modalities):
            spec = config.towers[modality]
            setattr(self, modality, build_tower(spec, sizes, trust_remote_code=trusted))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: a tensor that is missing is an error."""


def language_sizes(text_config: PreTrainedConfig) -> dict[str, int]:
    """What connectors and fusions must know of a language model, by its configuration."""
    return {"language_size": int(text_config.hidden_size), "language_layers": int(text_config.num_hidden_layers)}


def load_towers(
    config: OpticNerveConfig, state: dict[str, Tensor], modalities: Collection[str], *, dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> dict[str, Tower]:  # fmt: skip
    """The towers of `modalities`, by modality, on the CPU.

    Args:
        state: the tensors of these towers under their names in the folder.

    Raises:
        OpticNerveError: tensors are missing, superfluous or of another shape; the message lists them.
    """
    if not modalities:
        return {}
    load: Any = Towers.from_pretrained
    made, report = load(
        None, modalities, trust_remote_code, config=config, state_dict=state, dtype=dtype, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    if listing := list_problems(report):
        raise OpticNerveError(f"the towers' weights do not fit config.json: {listing}", kind="mismatch")
    towers = {m: getattr(made, m) for m in modalities}
    sizes = language_sizes(config.text_config)
    for modality, tower in towers.items():
        restore_buffers(tower, partial(build_tower, config.towers[modality], sizes, trust_remote_code=True))
        tower.requires_grad_(False).eval()
    return towers
