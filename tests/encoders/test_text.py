"""A text becomes one vector, whichever family reads it and whatever stands beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from errors import refused
from opticnerve.encoders.text import HFTextEncoder
from opticnerve.starter import minilm
from opticnerve.types import OpticNerveError

LONG = "the quick brown fox jumps over the lazy dog, and a triangle is green"


@pytest.mark.parametrize(("family", "pooling"), [
    ("bert", "mean"), ("bert", "first"), ("llama", "last"), ("gpt2", "last"), ("opt", "last"), ("llama", "mean"),
])  # fmt: skip
def test_a_text_has_one_vector_whatever_stands_beside_it(family: str, pooling: Any) -> None:
    """Alone, or padded on either side beside a longer text: the same vector."""
    encoder = tiny.text_encoder(family, pooling=pooling).eval()
    with torch.no_grad():
        alone = encoder(
            **{k: v for k, v in encoder.tokenizer("a dog", return_tensors="pt").items() if k != "token_type_ids"}
        )
        for side in ("left", "right"):
            encoder.tokenizer.padding_side = side
            both = encoder.tokenizer(["a dog", LONG], padding=True, return_tensors="pt")
            found = encoder(both["input_ids"], both["attention_mask"])
            torch.testing.assert_close(found[:1], alone, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(found[0], found[1])


def test_pooling_is_the_familys_own_by_default() -> None:
    assert [tiny.text_encoder(f).pooling for f in ("bert", "llama", "clip_text_model", "siglip_text_model")] == [
        "mean", "last", "pooler", "pooler",
    ]  # fmt: skip
    mean, first = tiny.text_encoder("bert", pooling="mean"), tiny.text_encoder("bert", pooling="first")
    ids = torch.tensor([[5, 6, 7]])
    states = mean.model(ids).last_hidden_state
    torch.testing.assert_close(mean(ids), states.mean(1))
    torch.testing.assert_close(first(ids), states[:, 0])
    assert mean.model.pooler is None  # BERT's own head is not carried along for nothing


def test_of_a_causal_model_the_last_hidden_state_is_taken_not_the_logits() -> None:
    whole = tiny.language_model("llama", len(tiny.tokenizer()))
    encoder = HFTextEncoder.from_loaded(whole, tiny.tokenizer())
    ids = torch.tensor([[5, 6, 7]])
    wanted = whole(ids, output_hidden_states=True).hidden_states[-1][:, -1]
    torch.testing.assert_close(encoder(ids), wanted)
    assert not any("lm_head" in n for n, _ in encoder.named_parameters())


def test_bad_text_encoders() -> None:
    with refused("unsupported", "t5"):
        HFTextEncoder(architecture={"model_type": "t5"}, pooling="mean")
    with refused("unknown-name", "mean, first, last, pooler", "'max'"):
        tiny.text_encoder(pooling="max")
    with refused("too-long", "max_length", 99, 64):
        tiny.text_encoder(max_length=99)
    with refused("empty", "token"):
        tiny.text_encoder()(torch.tensor([[5, 6], [0, 0]]), torch.tensor([[1, 1], [0, 0]]))


def test_a_text_encoder_from_a_folder(tmp_path: Path) -> None:
    encoder = tiny.text_encoder("bert")
    encoder.model.save_pretrained(tmp_path)  # without the head that mean pooling never reads
    encoder.tokenizer.save_pretrained(tmp_path)
    again = HFTextEncoder.from_pretrained(str(tmp_path)).eval()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(ids), encoder.eval()(ids))
    assert again.weight_files() == [str(tmp_path / "model.safetensors")]
    with refused("mismatch", "pooler.dense.bias"):
        HFTextEncoder.from_pretrained(str(tmp_path), pooling="pooler")


@pytest.mark.slow
def test_the_starters_bert_knows_what_is_alike() -> None:
    try:
        minilm.WEIGHTS.locate()
    except OpticNerveError as e:
        pytest.skip(str(e))
    encoder = HFTextEncoder.from_pretrained("starter/minilm")
    assert (encoder.pooling, encoder.hidden_size) == ("mean", 384)
    batch = encoder.tokenizer(["a dog", "a puppy", "a spreadsheet of taxes"], padding=True, return_tensors="pt")
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(encoder(batch["input_ids"], batch["attention_mask"]), dim=1)
    dog_puppy, dog_taxes = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert dog_puppy > 0.7
    assert dog_taxes < 0.3
