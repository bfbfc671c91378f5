"""Bases, adapters and whole models: what is missing, left over or of another shape is an error that lists it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from errors import refused
from opticnerve.encoders.hf_vision import HFVisionEncoder
from opticnerve.encoders.text import HFTextEncoder
from opticnerve.encoders.timm import TimmEncoder
from opticnerve.inference.load import load_model
from opticnerve.language.load import check_complete, load_language
from opticnerve.models.checkpoint.strict import no_larger_than, wrap_errors

pytestmark = pytest.mark.usefixtures("private_cache")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


LAYER = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda t: t.pop(LAYER), (f"missing {LAYER}",)),
        (rename(LAYER, "model.layers.0.mlp.up.weight"), (f"missing {LAYER}", "model.layers.0.mlp.up.weight")),
        (lambda t: t.update(stray=torch.ones(2)), ("stray",)),
        (lambda t: t.update({LAYER: torch.ones(3, 3)}), ("mismatched", LAYER)),
    ],
    ids=["missing", "renamed", "left over", "of another shape"],
)
def test_a_language_model(change: Any, facts: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "language"
    tiny.save_language(folder, "llama")
    load_language(str(folder))
    edit(folder, change)
    with refused("mismatch", *facts):
        load_language(str(folder))


def test_a_gguf_is_held_to_the_same() -> None:
    """(The report is what transformers gives for a GGUF file, too; a hole would stay in the cache for good.)"""
    with refused("mismatch", "'small.gguf'", "blk"):
        check_complete("small.gguf", {"missing_keys": {"blk"}, "unexpected_keys": set(), "mismatched_keys": set()})


def test_an_adapter_in_place_of_a_language_model(tmp_path: Path) -> None:
    tiny.save_language(tmp_path / "language", "llama")
    (tmp_path / "language/adapter_config.json").write_text('{"peft_type": "LORA"}')
    with refused("unsupported", "peft", "adapter_config.json"):
        load_language(str(tmp_path / "language"))


def test_an_adapter_in_place_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    with refused("unsupported", "peft", "adapter_config.json"):
        load_model(tmp_path)


NORM = "encoder.layers.1.layer_norm1.weight"


@pytest.mark.parametrize("change", ["missing", "renamed", "shape"])
def test_a_vision_transformer(change: str, tmp_path: Path) -> None:
    tiny.save_vision(tmp_path / "eye", "clip_vision_model")
    (name,) = (n for n in load_file(tmp_path / "eye/model.safetensors") if n.endswith(NORM))
    changes: dict[str, Any] = {
        "missing": lambda t: t.pop(name), "renamed": rename(name, "stray"), "shape": lambda t: t.update({name: torch.ones(5)}),
    }  # fmt: skip
    edit(tmp_path / "eye", changes[change])
    with refused("mismatch", "layer_norm1.weight"):
        HFVisionEncoder.from_pretrained(str(tmp_path / "eye"))


def test_a_timm_model_with_a_renamed_tensor(tmp_path: Path) -> None:
    name = tiny.save_timm(tmp_path / "eye")
    first = next(n for n in load_file(tmp_path / "eye/model.safetensors") if n.endswith(".weight"))
    edit(tmp_path / "eye", rename(first, "stray"))
    with refused("mismatch", first):
        TimmEncoder.from_pretrained(name)


def test_a_text_encoder(tmp_path: Path) -> None:
    tiny.save_bert(tmp_path / "bert")
    edit(tmp_path / "bert", lambda t: t.update({"embeddings.word_embeddings.weight": torch.ones(2, 2)}))
    with refused("mismatch", "word_embeddings"):
        HFTextEncoder.from_pretrained(str(tmp_path / "bert"))


class TestNoLargerThan:
    def test_a_model_of_that_size(self) -> None:
        with no_larger_than("x", tensors=2, elements=100), torch.device("meta"):
            nn.Linear(9, 9)

    def test_a_width_out_of_all_measure(self) -> None:
        with no_larger_than("x", 2, 100), torch.device("meta"), refused("too-large", "1,099,511,627,776", 100):
            nn.Linear(2**20, 2**20)

    def test_a_depth_out_of_all_measure(self) -> None:
        with no_larger_than("x", 2, 100), torch.device("meta"), refused("too-large", 513, 100):
            nn.Sequential(*(nn.Linear(1, 1) for _ in range(10**6)))

    def test_outside_of_it_everything_goes(self) -> None:
        with torch.device("meta"):
            nn.Linear(2**20, 2**20)


def test_whatever_breaks_is_told() -> None:
    with (
        refused("damaged", "the model", "here", "KeyError", "'a'") as e,
        wrap_errors("the model", "here"),
    ):
        raise KeyError("a")
    assert isinstance(e.value.__cause__, KeyError)
