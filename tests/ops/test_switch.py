"""`OPTICNERVE_PLAIN=1` switches everything off that exists only for speed, and that is said once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from opticnerve import ops
from opticnerve.common.private_names import CACHE
from opticnerve.encoders.hf_vision import HFVisionEncoder
from opticnerve.ops.attention import plain_attention
from opticnerve.ops.fused_decode import FusedDecoder, reserve
from opticnerve.ops.fused_layers import fuse_layers
from opticnerve.ops.head import supervised_logits, supervised_loss
from opticnerve.ops.offload import offload
from opticnerve.ops.varlen import supported

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def said_nothing_yet() -> None:
    ops.tell.cache_clear()


def llama() -> Any:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, vocab_size=64)).eval().requires_grad_(False)


def test_nothing_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OPTICNERVE_PLAIN", "1")
    model = llama()
    encoder = HFVisionEncoder(architecture=tf.CLIPVisionConfig(**SIZES, image_size=32, patch_size=8).to_dict())
    with caplog.at_level(logging.INFO, "opticnerve.ops"):
        assert not ops.enabled()
        assert not supported(model)
        assert FusedDecoder.of(model) is None
        assert offload([model], tmp_path) == 0
        with fuse_layers(model) as layers, plain_attention(nn.ModuleList([encoder])) as encoders:
            assert (layers, encoders) == (0, 0)
        cache = model(torch.ones(1, 3, dtype=torch.long), use_cache=True)[CACHE]
        assert not reserve(cache, 4)
    assert len([r for r in caplog.records if "OPTICNERVE_PLAIN" in r.message]) == 1


@pytest.mark.parametrize("value", ["", "0"])
def test_on_by_default(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OPTICNERVE_PLAIN", value)
    assert ops.enabled()
    assert supported(llama())


def test_the_head_says_the_same_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = llama(), torch.randint(64, (2, 5))
    places = torch.tensor([1, 3, 4, 5, 9])
    targets = torch.randint(64, (len(places),))
    found = []
    for value in ("0", "1"):
        monkeypatch.setenv("OPTICNERVE_PLAIN", value)
        found.append(
            (supervised_logits(model, places, input_ids=ids), supervised_loss(model, places, targets, input_ids=ids))
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_an_op_that_does_not_apply_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPTICNERVE_PLAIN", "0")
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    with caplog.at_level(logging.INFO, "opticnerve.ops"):
        for _ in range(2):
            assert FusedDecoder.of(model) is None
    assert [r.message for r in caplog.records if r.name == "opticnerve.ops"] == [
        "ops: GPT2LMHeadModel decodes by its own forward pass"
    ]
