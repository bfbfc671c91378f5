"""Any causal language model with its tokenizer: from a hub name, a local folder, a GGUF file, or the starter kit."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from opticnerve.common import hub
from opticnerve.common.cache import cache_dir, fingerprint, new_folder, weight_files
from opticnerve.common.hub import UNREADABLE, read_config, unreadable
from opticnerve.language.composite import causal_config, check_complete, load_weights, text_config_of, text_model
from opticnerve.language.layers import check_takes_embeddings
from opticnerve.language.sharded import check_not_sharded, load_sharded, loads_onto_shards
from opticnerve.starter import weights as starter
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
    config = load_language_config(name, gguf_file=gguf_file)
    with no_bars():
        tokenizer = load_tokenizer(name, gguf_file=gguf_file)
        whole = read_config(folder, name)
        if text_config_of(whole) is not whole:  # its language model is its text model, to be taken out
            check_not_sharded(name, whole)
            model = text_model(name, whole, config, dtype=dtype)
        elif loads_onto_shards():
            model = load_sharded(folder, name, config, dtype)
        else:
            model = load_weights(AutoModelForCausalLM, folder, name, dtype)
    if not loads_onto_shards():
        check_takes_embeddings(model, name)
    # What was asked for, not where it was found: configurations travel, folders do not.
    model.config.name_or_path = name
    return Language(model, tokenizer, name, tuple(files))


def load_tokenizer(name: str, *, gguf_file: str | None = None) -> Any:
    """The tokenizer beside a language model; its end token pads where it names no other.

    Raises:
        OpticNerveError: there is none that transformers can read, or it has neither padding nor end token.
    """
    folder = resolve(name, gguf_file=gguf_file, weights=False)[0]
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (*UNREADABLE, RuntimeError) as e:
        raise unreadable(
            f"the tokenizer of {name!r}", e, "save it beside the weights (tokenizer.save_pretrained)"
        ) from e
    if len(tokenizer) == 0:  # what transformers makes of a folder that holds none
        raise OpticNerveError(
            f"{name!r} holds no tokenizer; save it beside the weights (tokenizer.save_pretrained)", kind="missing-file"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise OpticNerveError(
                f"the tokenizer of {name!r} has neither padding nor end token; set one before docking",
                kind="unsupported",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# What tokenizers differ in: first spaces, white space, line breaks, digits, other scripts, beside special tokens.
_PROBES = ("dog", " dog", "42 犬です", "a\n\n b\t(c)", "🦊 é")


def keep_arguments(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a tokenizer write down all arguments of its constructor: Llama's forgets `legacy`, by which it spaces words
    behind special tokens."""
    for name in inspect.signature(type(tokenizer).__init__).parameters:
        value = getattr(tokenizer, name, None)
        if name not in tokenizer.init_kwargs and isinstance(value, bool | int | float | str):
            tokenizer.init_kwargs[name] = value


def check_saved(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse a folder from which another tokenizer would come back.

    Raises:
        OpticNerveError: it makes other tokens of some words than the one in memory.
    """
    again = AutoTokenizer.from_pretrained(folder)
    marks = ["", *{t for t in (tokenizer.bos_token, tokenizer.eos_token, *tokenizer.all_special_tokens[-2:]) if t}]
    for text in [mark + probe for mark in marks for probe in _PROBES]:
        now, then = tokenizer(text)["input_ids"], again(text)["input_ids"]
        if now != then:
            a, b = tokenizer.convert_ids_to_tokens(now), again.convert_ids_to_tokens(then)
            raise OpticNerveError(
                f"the tokenizer comes back from {folder} as another: of {text!r} it makes {a}, saved and loaded {b}; "
                "save it as transformers' PreTrainedTokenizerFast (its tokenizer.json says all), and dock with that",
                kind="mismatch",
            )


def load_language_config(name: str, *, gguf_file: str | None = None) -> Any:
    """The language model's configuration alone (for `plan`): no weight is read, except where a GGUF file holds both.

    Of a composite checkpoint (Gemma 3, Qwen2.5-VL, LLaVA, …) that of its text model.

    Raises:
        OpticNerveError: nothing that transformers can read, or no causal language model.
    """
    folder = resolve(name, gguf_file=gguf_file, weights=False)[0]
    if (Path(folder) / "adapter_config.json").is_file():
        # transformers would put the adapter onto the base that it names, and say nothing.
        raise OpticNerveError(
            f"{name!r} holds an adapter of peft (adapter_config.json), not a language model alone; merge it into its "
            "base with peft's merge_and_unload(), save that, and name its folder",
            kind="unsupported",
        )
    return causal_config(name, read_config(folder, name))


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
            raise OpticNerveError(f"there is no GGUF file {name!r}", kind="missing-file")
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
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
            # transformers 5 keeps GGUF weights packed unless told otherwise.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(file.parent), gguf_file=file.name, dtype=torch.float32, output_loading_info=True,
                quantization_config=GgufConfig(dequantize=True),
            )  # fmt: skip
        except (*UNREADABLE, RuntimeError) as e:
            raise unreadable(
                f"the GGUF file {str(file)!r}", e, "give one that holds a whole language model, or a folder"
            ) from e
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
