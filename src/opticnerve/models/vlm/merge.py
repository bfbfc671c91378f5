"""A folder of its own from what a run trained and the bases it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opticnerve.common.cache import new_folder
from opticnerve.language.lora import has_lora, merge_lora
from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.processing import OpticNerveProcessor
from opticnerve.types import OpticNerveError


def merge(source: Path, out: Path, *, trust_remote_code: bool = False) -> Path:
    """Load `source`, add LoRA into the weights, and save everything under `out`: weights, configuration, processor.

    Raises:
        OpticNerveError: `out` exists already, or the bases are not those that `source` was trained on.
    """
    if out.exists():
        raise OpticNerveError(f"{out} exists already; choose another folder")
    model = OpticNerveForConditionalGeneration.from_pretrained(
        source, dtype="auto", trust_remote_code=trust_remote_code
    )
    merge_adapter(model)
    with new_folder(out) as new:
        model.save_pretrained(new)
        OpticNerveProcessor.from_pretrained(source).save_pretrained(new)
    return out


def is_gated(model: Any) -> bool:
    """Whether the adapter steps aside for text alone (`lora.when: media`): no sum of weights can do that."""
    return (model.config.lora or {}).get("when", "always") != "always"


def merge_adapter(model: Any) -> None:
    """Add the LoRA adapter, if there is one, into the language model's weights; a gated one stays as it is."""
    if has_lora(model.language_model) and not is_gated(model):
        merge_lora(model.language_model)
        model.config.lora = None
