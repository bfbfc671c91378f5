"""The keywords of `from_pretrained`. For a run's folder each is honoured, does no harm, or is refused by its name; for
any folder, what docking added stays as it is when transformers quantises the rest."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

from opticnerve.common.private_names import attention_of, layers_not_to_split
from opticnerve.recipe import Quantize
from opticnerve.types import OpticNerveError

# Left alone, transformers' quantizers spare a language model's head, which they find by their rules, and take all else:
# connectors and fusions, which are small and were trained in their precision, and the halves of LoRA, whose ranks no
# kernel likes. What they call the list of modules that they leave alone.
_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Where and how to fetch files, which lie here already; how to read tensors, which a run's folder does in its own way.
_HARMLESS = {
    "adapter_kwargs", "cache_dir", "code_revision", "disable_mmap", "force_download", "ignore_mismatched_sizes",
    "local_files_only", "low_cpu_mem_usage", "offload_state_dict", "proxies", "revision", "token", "tqdm_class",
    "use_safetensors", "weights_only",
}  # fmt: skip
# What says nothing of the model, or is named elsewhere.
_VOLATILE = ("_name_or_path", "dtype", "name_or_path", "torch_dtype", "transformers_version")


@dataclass
class LoadOptions:
    """What `from_pretrained(run, **options)` was asked for; fields are called as transformers' keywords."""

    attn_implementation: str | dict[str, Any] | None = None
    config: PreTrainedConfig | None = None
    device_map: Any = None
    max_memory: dict[Any, Any] | None = None
    offload_buffers: bool = False
    offload_folder: str | Path | None = None
    output_loading_info: bool = False
    quantization_config: Any = None

    @classmethod
    def of(cls, folder: Path, options: dict[str, Any]) -> LoadOptions:
        """Sort the keywords.

        Raises:
            OpticNerveError: one asks for what a run's folder cannot do.
        """
        known = {f.name for f in fields(cls)}
        given = {k: v for k, v in options.items() if v is not None and not k.startswith("_") and k not in _HARMLESS}
        if not given.get("subfolder", True):
            del given["subfolder"]
        if strange := sorted(set(given) - known):
            raise OpticNerveError(
                f"{folder} is a run's folder: it names its base models and holds what was trained beside them, and "
                f"cannot be loaded with {', '.join(strange)}; `opticnerve merge {folder} OUT` makes a self-contained "
                "folder, which takes whatever transformers does",
                kind="unsupported",
            )
        chosen = cls(**given)
        if chosen.config is not None and not isinstance(chosen.config, PreTrainedConfig):
            raise OpticNerveError(
                f"config={str(chosen.config)[:80]!r}: a run's folder is loaded by its own config.json; leave config "
                "out, or give the configuration itself",
                kind="unsupported",
            )
        return chosen

    def quantized(self, recorded: dict[str, Quantize]) -> dict[str, Quantize]:
        """How the parts are quantised: as they were in training, and the language model as the caller wants it.

        Raises:
            OpticNerveError: it was trained over weights of another kind, or of such a kind there are none here.
        """
        given, asked = self.quantization_config, None
        if given is None:
            return recorded
        said = dict(given) if isinstance(given, dict) else given.to_dict()
        if said.get("load_in_8bit"):
            asked = "int8"
        elif said.get("load_in_4bit") and said.get("bnb_4bit_quant_type") == "nf4":
            asked = "nf4"
        if asked is None or said.get("llm_int8_skip_modules"):
            raise OpticNerveError(
                f"quantization_config={str(said)[:200]}: a run's folder is loaded in int8 or nf4 by bitsandbytes, "
                "without a list of modules; `opticnerve merge` makes a self-contained folder, which takes whatever "
                "transformers does",
                kind="unsupported",
            )
        if recorded.get("language", asked) != asked:
            raise OpticNerveError(
                f"the language model was trained over {recorded['language']} and is asked for in {asked}; leave "
                "quantization_config out, or merge the run before",
                kind="conflict",
            )
        return {**recorded, "language": cast("Quantize", asked)}

    def agree(self, folder: Path, own: PreTrainedConfig) -> None:
        """See that `config`, where one was given (transformers' Auto classes always do), is the folder's own.

        Raises:
            OpticNerveError: it describes another model.
        """
        if self.config is None:
            return
        theirs, ours = _lasting(self.config.to_dict()), _lasting(own.to_dict())
        if differing := sorted(k for k in theirs | ours if theirs.get(k) != ours.get(k)):
            raise OpticNerveError(
                f"{folder}: the configuration given differs from the folder's own in {', '.join(differing)}; what was "
                f"trained fits its own alone. Load it as it is, or change config.json after `opticnerve merge {folder} "
                "OUT`",
                kind="mismatch",
            )
        self.attn_implementation = self.attn_implementation or attention_of(self.config)

    def apply(self, model: PreTrainedModel) -> None:
        """Attention and devices, once the weights are there.

        Raises:
            OpticNerveError: the model has no such attention, or does not fit where it was told to.
        """
        if self.attn_implementation is not None:
            try:
                model.set_attn_implementation(self.attn_implementation)
            except (ImportError, ValueError) as e:
                raise OpticNerveError(
                    f"attn_implementation={self.attn_implementation!r}: {str(e)[:500]}", kind="unsupported"
                ) from e
        if self.device_map is not None:
            try:
                self._place(model)
            except (RuntimeError, ValueError) as e:
                raise OpticNerveError(f"device_map={self.device_map!r}: {str(e)[:500]}", kind="unsupported") from e

    def _place(self, model: PreTrainedModel) -> None:
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        device_map, whole = self.device_map, layers_not_to_split(model)
        if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            memory = self.max_memory
            if device_map != "sequential":
                memory = get_balanced_memory(
                    model, memory, no_split_module_classes=whole, low_zero=device_map == "balanced_low_0"
                )
            device_map = infer_auto_device_map(
                model, memory, no_split_module_classes=whole, offload_buffers=self.offload_buffers
            )
        elif not isinstance(device_map, dict):
            device_map = {"": device_map}
        places = set(device_map.values())
        if len(places) == 1 and places != {"disk"}:
            nn.Module.to(model, places.pop())
        else:
            dispatch_model(model, device_map, offload_dir=self.offload_folder, offload_buffers=self.offload_buffers)

    def result(self, model: Any) -> Any:
        """The model; with `output_loading_info`, transformers' report beside it. (Problems are refused before.)"""
        if not self.output_loading_info:
            return model
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        return model, {**{kind: set() for kind in kinds}, "error_msgs": []}


def floating(options: dict[str, Any], dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    """`dtype`, or what its older name `torch_dtype` says, which is taken out of the options."""
    older = options.pop("torch_dtype", None)
    return older if dtype is None else dtype


def _lasting(described: Any) -> Any:
    """A configuration's entries that make a model another one."""
    if isinstance(described, dict):
        return {k: _lasting(v) for k, v in described.items() if k not in _VOLATILE}
    return list(map(_lasting, described)) if isinstance(described, list | tuple) else described


def spare(config_class: Any, source: str | PathLike[Any] | None, options: dict[str, Any]) -> None:
    """Complete the `quantization_config` among the keywords of `from_pretrained`; the user's own is not changed.

    Without a list of the user's, a docked model's encoders are spared, too.
    """
    given = options.get("quantization_config")
    if given is None:
        return
    config = options.get("config")
    if not isinstance(config, PreTrainedConfig):
        config = config_class.from_pretrained(config or source, **{k: options[k] for k in _HUB if k in options})
    chosen = AutoQuantizationConfig.from_dict(dict(given)) if isinstance(given, dict) else copy.deepcopy(given)
    for name in _LISTS:
        if hasattr(chosen, name):
            listed = getattr(chosen, name)
            setattr(chosen, name, [*(listed or ()), *spared(config, encoders=listed is None)])
            break
    options["quantization_config"] = chosen


def spared(config: Any, *, encoders: bool) -> list[str]:
    """Names of modules, as patterns from the beginning of the full name. Of dual encoders and classifiers all but the
    encoders, and of these the pooling heads, whose attention reads its weights past their layers."""
    if not hasattr(config, "towers"):
        return ["image.projection", "text.projection", "classifier", r".*\.encoder\.model\.head", r".*\.lora_[AB]"]
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(config.text_config)
    ends = (language.get_input_embeddings(), language.get_output_embeddings())
    names = [f"language_model.{n}" for n, m in language.named_modules() if any(m is end for end in ends)]
    halves = ("",) if encoders else (".connector", ".fusion", ".tiling")
    return [*names, *(f"{modality}{half}" for modality in config.towers for half in halves), r".*\.lora_[AB]"]
