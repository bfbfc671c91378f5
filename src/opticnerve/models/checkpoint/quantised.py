"""What stays as it is when transformers quantises a dock: `from_pretrained(folder, quantization_config=…)`.

Left alone, transformers spares a language model's head, which it finds by its rules, and quantises all else: connectors
and fusions, which are small and were trained in their precision, and the halves of LoRA, whose ranks no kernel likes.
"""

from __future__ import annotations

import copy
from os import PathLike
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.quantizers import AutoQuantizationConfig

# What quantizers call the list of modules that they leave alone.
_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def spare(config_class: Any, source: str | PathLike[Any] | None, options: dict[str, Any]) -> None:
    """Complete the `quantization_config` among the keywords of `from_pretrained`; the user's own is not changed.

    Without a list of the user's, encoders are spared, too.
    """
    given = options.get("quantization_config")
    if given is None:
        return
    config = options.get("config")
    if not isinstance(config, PreTrainedConfig):
        config = config_class.from_pretrained(config or source, **{k: options[k] for k in _HUB if k in options})
    if not hasattr(config, "towers"):
        return
    chosen = AutoQuantizationConfig.from_dict(dict(given)) if isinstance(given, dict) else copy.deepcopy(given)
    for name in _LISTS:
        if hasattr(chosen, name):
            listed = getattr(chosen, name)
            setattr(chosen, name, [*(listed or ()), *spared(config, encoders=listed is None)])
            break
    options["quantization_config"] = chosen


def spared(config: Any, *, encoders: bool) -> list[str]:
    """Names of modules, as patterns from the beginning of the full name."""
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(config.text_config)
    ends = (language.get_input_embeddings(), language.get_output_embeddings())
    names = [f"language_model.{n}" for n, m in language.named_modules() if any(m is end for end in ends)]
    halves = ("",) if encoders else (".connector", ".fusion", ".tiling")
    return [*names, *(f"{modality}{half}" for modality in config.towers for half in halves), r".*\.lora_[AB]"]
