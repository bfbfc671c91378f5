"""A model of any family and its processor from wherever they are: a run, a stage of it, a self-contained folder, a hub
name, "starter"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from opticnerve.common import hub
from opticnerve.models.checkpoint.strict import wrap_errors
from opticnerve.models.family import family_of
from opticnerve.models.vlm.processing import OpticNerveProcessor
from opticnerve.types import OpticNerveError

Dtype = torch.dtype | str | None


def load_model(
    name: str | Path, *, device: str | None = None, dtype: Dtype = None, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Load a docked model for use, in `eval()`; see `load_any`."""
    folder = resolve(str(name))
    family = family_of(folder)
    if not family.MODEL.can_generate():
        raise OpticNerveError(
            f"{name} holds no docked language model but a {family.SPEC.KIND} model; {family.USE}", kind="unsupported"
        )
    return load_any(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)


def load_any(
    name: str | Path, *, device: str | None = None, dtype: Dtype = None, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Load a model of any family and its processor for use, in `eval()`.

    Args:
        name: a run's folder, a stage's folder, a folder of `save_pretrained` or `opticnerve merge`, a hub name, or
            "starter" for the model that ships with the package.
        device: "cpu", "cuda", …; the first accelerator by default.
        dtype: of the weights; as it was trained by default.
        trust_remote_code: run parts that the checkpoint names by dotted path.
    """
    folder = resolve(str(name))
    family = family_of(folder)
    model = family.MODEL.from_pretrained(folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code)
    return model.to(device or default_device()).eval(), load_processor(folder, family.PROCESSOR)


def load_processor(folder: str, cls: type[Any] = OpticNerveProcessor) -> Any:
    """The processor beside a model; whatever is wrong with its files is one error."""
    with wrap_errors("the processor", folder):
        return cls.from_pretrained(folder)


ADAPTER = "adapter_config.json"


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
                "with peft's merge_and_unload(), save that, and name the folder as the recipe's language",
                kind="unsupported",
            )
        raise OpticNerveError(
            f"{name} holds no model (no config.json); a run has one once its first stage has ended", kind="missing-file"
        )
    return hub.fetch(name, weights=weights)
