"""Language models from folders and GGUF files, with any tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from errors import refused
from opticnerve.language.load import load_language, load_language_config, resolve

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_folders(language_folder: Callable[..., str], family: str) -> None:
    folder = language_folder(family)
    loaded = load_language(folder)
    assert loaded.name == folder
    assert [Path(f).name for f in loaded.files] == ["model.safetensors"]
    assert loaded.tokenizer.pad_token_id is not None
    fresh = tiny.language_model(family, len(loaded.tokenizer)).state_dict()
    assert all(torch.equal(t, fresh[n]) for n, t in loaded.model.state_dict().items())


@pytest.mark.parametrize("kind", tiny.TOKENIZERS)
def test_tokenizers_come_back_as_they_were(language_folder: Callable[..., str], kind: str) -> None:
    loaded = load_language(language_folder("llama", kind)).tokenizer
    bare = tiny.tokenizer(kind)
    text = "<|im_start|>user\nIs it naïve? 🦊 狐<|im_end|>\n"
    assert loaded(text)["input_ids"] == bare(text)["input_ids"]
    assert (
        loaded(text, return_offsets_mapping=True)["offset_mapping"]
        == bare(text, return_offsets_mapping=True)["offset_mapping"]
    )


def test_precision(language_folder: Callable[..., str]) -> None:
    assert load_language(language_folder(), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    folder = tiny.save_language(tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with refused("mismatch", "model.norm.weight"):
        load_language(folder)


def test_a_tokenizer_without_any_end(tmp_path: Path) -> None:
    folder = tiny.save_language(tmp_path / "m")
    path = tmp_path / "m/tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in ("eos_token", "pad_token")}))
    with refused("unsupported", "padding"):
        load_language(folder)


def test_no_such_gguf() -> None:
    with refused("missing-file", "GGUF", "nowhere/model.gguf"):
        load_language("nowhere/model.gguf")


def test_unknown_starter() -> None:
    with refused("unknown-name", "starter/gpt-9", "starter/smollm2-135m-instruct"):
        resolve("starter/gpt-9")


def test_config_alone(language_folder: Callable[..., str]) -> None:
    assert load_language_config(language_folder("qwen2")).model_type == "qwen2"
