"""A model of any family and its processor from wherever they are: a run, a stage of it, a self-contained folder, a hub
name, "starter"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from opticnerve.models.checkpoint.source import resolve
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


def default_device() -> str:
    """The accelerator that torch sees, else the CPU."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # type: ignore[union-attr]
