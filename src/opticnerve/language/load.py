"""Any causal language model with its tokenizer: from a hub name, a local folder, a GGUF file, or the starter kit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from opticnerve import hub
from opticnerve.starter import weights as starter
from opticnerve.starter.cache import cache_dir, fingerprint, new_folder, weight_files
from opticnerve.types import OpticNerveError


@dataclass(frozen=True)
class Language:
    """A language model, its tokenizer, and what names it: `name` as the user wrote it, the files its weights came
    from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    files: tuple[str, ...]


def load_language(name: str, *, dtype: torch.dtype = torch.float32, gguf_file: str | None = None) -> Language:
    """Load a causal language model and its tokenizer.

    Args:
        name: hub name, local folder, path of a `.gguf` file, or `starter/…`.
        dtype: of the weights in memory.
        gguf_file: a GGUF file within the folder or hub repository `name`.

    GGUF weights are dequantised once into the cache, for training needs real matrices.
    """
    folder, files = resolve(name, gguf_file=gguf_file)
    if (Path(folder) / "adapter_config.json").is_file():
        # transformers would put the adapter onto the base that it names, and say nothing.
        raise OpticNerveError(
            f"{name!r} holds an adapter of peft (adapter_config.json), not a language model alone; merge it into its "
            "base with peft's merge_and_unload(), save that, and name its folder"
        )
    with no_bars():
        tokenizer = load_tokenizer(folder, name)
        # Mismatched tensors are listed below with the others, and refused.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, report = loaded
    check_complete(name, report)
    # What was asked for, not where it was found: configurations travel, folders do not.
    model.config._name_or_path = name
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise OpticNerveError(
                f"the tokenizer of {name!r} has neither padding nor end token; set one before docking"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return Language(model, tokenizer, name, tuple(files))


def check_complete(name: str, report: dict[str, Any]) -> None:
    """Refuse a language model that transformers would fill up with random weights, or leave some of its weights out.

    Raises:
        OpticNerveError: the message lists the tensors.
    """
    problems = {k: sorted(map(str, v)) for k, v in report.items() if k.endswith("_keys") and v}
    if problems:
        listing = "; ".join(f"{k.removesuffix('_keys')} {', '.join(v[:8])}" for k, v in problems.items())
        raise OpticNerveError(f"the weights of {name!r} are not those of its config.json: {listing}")


def load_language_config(name: str, *, gguf_file: str | None = None) -> Any:
    """The configuration alone (for `plan`): no weight is read, except where a GGUF file holds both."""
    folder, _ = resolve(name, gguf_file=gguf_file, weights=False)
    with hub.reading("the configuration", name, "name a causal language model of transformers"):
        return AutoConfig.from_pretrained(folder)


def load_tokenizer(folder: str, name: str) -> Any:
    """The tokenizer in a folder.

    Raises:
        OpticNerveError: there is none, or its files are damaged.
    """
    with hub.reading("the tokenizer", name, "save one into a copy of it, or name the model that it was made from"):
        return AutoTokenizer.from_pretrained(folder)


def resolve(name: str, *, gguf_file: str | None = None, weights: bool = True) -> tuple[str, list[str]]:
    """A folder that transformers reads as it is, and the files whose contents identify the weights.

    Args:
        weights: False fetches nothing large of a name of the hub.
    """
    if starter.is_starter(name):
        file = starter.language(name).file()
        return str(_dequantised(file)), [str(file)]
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise OpticNerveError(f"there is no GGUF file {name!r}")
        return str(_dequantised(path)), [str(path)]
    if gguf_file is not None:
        found = hub.fetch_file(name, gguf_file)
        return str(_dequantised(found)), [str(found)]
    folder = hub.fetch(name, weights=weights)
    return folder, weight_files(Path(folder))


def _dequantised(file: Path) -> Path:
    """A plain float32 folder made from a GGUF file, kept in the cache under the hash of the file."""
    target = cache_dir() / "dequantised" / f"{file.stem}-{fingerprint([file])[:16]}"
    if target.is_dir():
        return target
    from transformers import GgufConfig

    with new_folder(target) as new, no_bars():
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        # transformers 5 keeps GGUF weights packed unless told otherwise.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True,
            quantization_config=GgufConfig(dequantize=True),
        )  # fmt: skip
        model, report = loaded
        check_complete(str(file), report)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    return target


@contextmanager
def no_bars() -> Iterator[None]:
    """Local files load in a second: transformers' progress bars would only litter the terminal."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def tensor_fingerprint(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors: the identity of weights that came from no file."""
    total = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        total.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        total.update(tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return total.hexdigest()
