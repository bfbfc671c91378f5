"""`hf-blip2`: docks with a Q-Former in stock transformers, and a published kind of checkpoint there and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import checkpoints
import tiny
from errors import refused
from opticnerve.export.export import export
from opticnerve.export.hf import blip2
from opticnerve.models.import_hf.run import import_checkpoint

pytestmark = pytest.mark.usefixtures("private_cache")
Make = Callable[..., Path]
FORMER = {
    "type": "qformer", "num_queries": 5, "hidden_size": 16, "depth": 3, "heads": 2, "intermediate_size": 24,
}  # fmt: skip
DOCK = {"vision_encoder": "blip_2_vision_model", "connector": FORMER, "class_token": "keep", "layer": "last"}


def test_stock_transformers_gives_the_same_answers(saved: Make, tmp_path: Path) -> None:
    """The whole way: bfloat16, an adapter, a calibration, a process of its own."""
    source = saved("llama", **DOCK, lora={"rank": 4}, dtype=torch.bfloat16)
    made = export(source, "hf-blip2", tmp_path / "out")
    assert made.proof is not None
    assert made.proof.engine == f"transformers {tf.__version__}"
    assert made.proof.samples == 4  # of five: none without a picture
    assert made.proof.difference <= 1e-5
    model = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "Blip2ForConditionalGeneration"
    end = tf.AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|im_end|>")
    assert end in model.language_model.generation_config.eos_token_id  # the one that `generate` listens to


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    "options",
    [
        {"family": "opt", "image_size": 48},
        {"family": "qwen2", "vision_encoder": "vit"},
        {"family": "phi", "vision_encoder": "vit", "image_size": 48},
        {"family": "gpt2", "vision_encoder": "dinov2", "dtype": torch.bfloat16},
        {"family": "gemma2", "vision_encoder": "instructblip_vision_model"},
        {"family": "llama", "connector": {**FORMER, "text": True, "vocab_size": 40}},
    ],
)
def test_other_eyes_and_any_language_model(options: dict[str, Any], saved: Make, tmp_path: Path) -> None:
    made = export(saved(**{**DOCK, **options}), "hf-blip2", tmp_path / "out")
    assert made.proof is not None
    assert made.proof.difference <= 1e-5


@pytest.mark.usefixtures("in_this_process")
def test_there_and_back_the_logits_are_the_same(tmp_path: Path) -> None:
    """transformers → opticnerve → transformers: every tensor is its old self, and so are the logits."""
    source = checkpoints.save_blip2(tmp_path / "theirs")
    import_checkpoint(source, tmp_path / "ours")
    export(tmp_path / "ours", "hf-blip2", tmp_path / "again")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    assert set(after) == set(before)
    assert all(torch.equal(after[n], before[n]) for n in before)
    first, second = (tf.AutoModelForImageTextToText.from_pretrained(f) for f in (source, tmp_path / "again"))
    theirs, again = (tf.AutoProcessor.from_pretrained(f) for f in (source, tmp_path / "again"))
    inputs = theirs(images=tiny.picture(), text="what is it?", return_tensors="pt")
    same = again(images=tiny.picture(), text="<image></s>what is it?", return_tensors="pt")
    assert same["input_ids"].tolist() == inputs["input_ids"].tolist()
    with torch.no_grad():
        torch.testing.assert_close(second(**same).logits, first(**inputs).logits, rtol=0, atol=1e-5)


def test_what_was_exported_is_imported_again(saved: Make, comes_back: Callable[..., None]) -> None:
    comes_back(saved("qwen2", **DOCK), "hf-blip2", tiny.picture(), atol=1e-5)


@pytest.mark.usefixtures("in_this_process")
def test_queries_in_another_order_are_caught_and_nothing_stays(
    saved: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = blip2.HFBlip2.state

    def turned(*args: Any) -> dict[str, Any]:
        state = honest(*args)
        return {**state, "query_tokens": state["query_tokens"].flip(1)}

    monkeypatch.setattr(blip2.HFBlip2, "state", turned)
    with refused("mismatch", "logits"):
        export(saved("llama", **DOCK), "hf-blip2", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"vision_encoder": "clip_vision_model"}, "its vision encoder is a clip_vision_model"),
        ({"vision_encoder": "vit", "class_token": "drop"}, "does not see the class token"),
        ({"layer": -2}, "its vision encoder is read at layer -2"),
        ({"connector": "mlp"}, "its connector is mlp"),
        ({"connector": {**FORMER, "instruct": True, "text_tokenizer": "BERT"}}, "as InstructBLIP's does"),
        ({"lora": {"rank": 2, "when": "media"}}, "lora.when: media"),
    ],
)
def test_what_blip2_cannot_hold_is_refused_with_a_way_out(
    options: dict[str, Any], reason: str, saved: Make, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if (former := options.get("connector")) and "text_tokenizer" in former:
        bert = tiny.save_bert(tmp_path_factory.mktemp("bert"))
        options = {"connector": {**former, "text_tokenizer": bert}}
    with refused("unsupported", reason, "nearest"):
        export(saved(**{**DOCK, **options}), "hf-blip2", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
