"""A model and its processor from wherever they are: a run, a stage of it, a self-contained folder, a hub name,
"starter"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from opticnerve.common import hub
from opticnerve.models import OpticNerveForConditionalGeneration, OpticNerveProcessor
from opticnerve.models.checkpoint.strict import wrap_errors
from opticnerve.types import OpticNerveError


def load_model(
    name: str | Path, *, device: str | None = None, dtype: Any = None, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Load a docked model for use, in `eval()`.

    Args:
        name: a run's folder, a stage's folder, a folder of `save_pretrained` or `opticnerve merge`, a hub name, or
            "starter" for the model that ships with the package.
        device: "cpu", "cuda", …; the first accelerator by default.
        dtype: of the weights; as it was trained by default.
        trust_remote_code: run parts that the checkpoint names by dotted path.
    """
    folder = resolve(str(name))
    if kind_of(folder) != "docked":
        use = "`opticnerve classify`, `embed` and `eval` take it" if kind_of(folder) == "dual" else "`eval` takes it"
        raise OpticNerveError(f"{name} holds no docked language model but a {kind_of(folder)} model; {use}")
    model = OpticNerveForConditionalGeneration.from_pretrained(
        folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code
    )
    return model.to(device or default_device()).eval(), load_processor(folder)


def load_processor(folder: str) -> Any:
    """The processor beside a docked model; whatever is wrong with its files is one error."""
    with wrap_errors("the processor", folder):
        return OpticNerveProcessor.from_pretrained(folder)


def kind_of(name: str) -> str:
    """What a folder holds: "docked", "dual" or "classifier", by its config.json.

    Raises:
        OpticNerveError: it is damaged, or another library's model.
    """
    with wrap_errors("config.json", name):
        config, _ = PreTrainedConfig.get_config_dict(name)
        kind = _KINDS.get(str(config.get("model_type")))
    if kind is None:
        raise OpticNerveError(
            f"{name} holds a {str(config.get('model_type'))[:80]}, which is no model of opticnerve; `opticnerve "
            "import` takes LLaVA's and BLIP-2's kinds over, and a recipe docks encoders onto language models"
        )
    return kind


ADAPTER = "adapter_config.json"
# By `model_type` of config.json.
_KINDS = {"opticnerve": "docked", "opticnerve_dual_encoder": "dual", "opticnerve_fusion_classifier": "classifier"}


def default_device() -> str:
    """The accelerator that torch sees, else the CPU."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # type: ignore[union-attr]


def resolve(name: str, *, weights: bool = True) -> str:
    """The folder that a model's name stands for; one of a hub is fetched first, its weights where they are wanted."""
    if name == "starter":
        from opticnerve.starter.demo import shipped_model

        return str(shipped_model())
    path = Path(name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return name
        stages = sorted(p.parent for p in path.glob("stages/*/dock.json"))
        if stages:
            return str(stages[-1])
        if (path / ADAPTER).is_file():
            raise OpticNerveError(
                f"{name} is an adapter of peft without its model ({ADAPTER}, no config.json); merge it into its base "
                "with peft's merge_and_unload(), save that, and name the folder as the recipe's language"
            )
        raise OpticNerveError(f"{name} holds no model (no config.json); a run has one once its first stage has ended")
    return hub.fetch(name, weights=weights)
