"""The adapters alone, as peft keeps them: a folder that `PeftModel.from_pretrained` puts onto the base."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import TaskType
from torch import Tensor, nn

from opticnerve.common.tensors import save_tensors
from opticnerve.export.formats import Format, Trial
from opticnerve.export.simplify import adapter_refusals
from opticnerve.language.adapters import ADAPTER, our_layers
from opticnerve.language.experts import is_expert
from opticnerve.language.lora import START
from opticnerve.models.checkpoint import delta
from opticnerve.models.checkpoint.source import ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.processing import OpticNerveProcessor


class PeftAdapter(Format):
    """`adapter_config.json` and `adapter_model.safetensors` of the language model's adapter, by the names of the
    language model alone; those of encoders and fusions in folders called as they are, `image.encoder`.

    PiSSA's adapter stands beside weights that are without what it began with. Here it is one of twice the rank that
    takes the beginning out again (s·(B A − B₀ A₀)), so that it stands beside the weights as they are published.
    """

    dtypes = ()
    program = "peft_adapter"

    def refuse(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> list[str]:
        if not model.adapted:
            return ["it has no adapter; nearest: the format merged"]
        return adapter_refusals(model)

    def simplify(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> None:
        """Nothing: the adapters are what is written."""

    def write(
        self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor, folder: Path
    ) -> list[str]:
        run = delta.find(model.name_or_path) if model.name_or_path else None
        base = None if run is None else delta.read(run)["bases"].get("language", {}).get("name")
        for part, module in model.adapted.items():
            place = folder if part == "language" else folder / part
            save(module, place, base if part == "language" else None, causal=part == "language")
        notes = [f"the adapter of {part} is in {part}/" for part in model.adapted if part != "language"]
        if base is None and "language" in model.adapted:
            notes.append("adapter_config.json names no base model: give peft the language model itself")
        return notes

    def job(self, folder: Path, trial: Trial) -> dict[str, Any]:
        return {
            "model": trial.model.name_or_path, "folder": str(folder), "parts": list(trial.model.adapted),
            "pictures": str(trial.scratch), "picture_sizes": self.picture_sizes(None),
            "trust_remote_code": self.options.trust_remote_code,
        }  # fmt: skip


def save(module: nn.Module, folder: Path, base: str | None, *, causal: bool) -> None:
    """Write the adapter that stands in a module, by the names of that module.

    Args:
        base: what the module was made of, for `base_model_name_or_path`. causal: whether it is a language model.
    """
    layers = dict(our_layers(module))
    config: Any = copy.deepcopy(module.lora_config)
    twice = any(hasattr(layer.lora_A[ADAPTER], START) for layer in layers.values())
    if twice:
        config.r *= 2
        config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    config.init_lora_weights, config.inference_mode = True, True
    config.base_model_name_or_path = base
    config.task_type = TaskType.CAUSAL_LM if causal else None
    # Those of experts are changes of tensors, which `target_parameters` names.
    linear = {name for name in layers if not is_expert(name)}
    config.target_modules = _targets(module, linear) if linear else []
    tensors = {
        f"base_model.model.{name}.{key}": tensor
        for name, layer in layers.items() for key, tensor in _tensors(layer)
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / ADAPTER_WEIGHTS)
    config.save_pretrained(str(folder))


def _targets(module: nn.Module, names: set[str]) -> set[str]:
    """The layers by the ends of their names, as engines expect them (q_proj), where these mean no others."""
    ends = {name.rpartition(".")[2] for name in names}
    meant = {n for n, _ in module.named_modules() if n.rpartition(".")[2] in ends}
    return ends if meant == names else names


def _tensors(layer: Any) -> Iterator[tuple[str, Tensor]]:
    """A layer's tensors, as peft's files call them."""
    low, high = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    if hasattr(low, START):
        yield "lora_A.weight", torch.cat([low.weight, low.start])
        yield "lora_B.weight", torch.cat([high.weight, -high.start], 1)
    else:
        yield "lora_A.weight", low.weight
        yield "lora_B.weight", high.weight
    if ADAPTER in layer.lora_magnitude_vector:
        yield "lora_magnitude_vector", layer.lora_magnitude_vector[ADAPTER].weight
