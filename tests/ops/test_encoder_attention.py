"""Encoders attend by our products within a stage, to the same values, and by torch's afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from opticnerve.encoders.hf_vision import HFVisionEncoder
from opticnerve.ops import attention, enabled
from opticnerve.ops.attention import plain_attention

pytestmark = pytest.mark.skipif(not enabled(), reason="OPTICNERVE_PLAIN switches it off")
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
VISION_ENCODERS: dict[str, Callable[[], Any]] = {
    "clip": lambda: tf.CLIPVisionConfig(**SIZES),
    "siglip": lambda: tf.SiglipVisionConfig(**SIZES),
    "dinov2": lambda: tf.Dinov2Config(**{k: v for k, v in SIZES.items() if k != "intermediate_size"}),
    "siglip2, any shape": lambda: tf.Siglip2VisionConfig(
        **{k: v for k, v in SIZES.items() if k != "image_size"}, num_patches=16
    ),
}


def vision_encoder(kind: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return HFVisionEncoder(architecture=VISION_ENCODERS[kind]().to_dict()).to(dtype).eval()


def run(encoder: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    pixels = torch.randn(3, 3, 32, 32).to(dtype).requires_grad_()
    tokens_BND = encoder(pixels).tokens_BND
    torch.manual_seed(2)
    tokens_BND.backward(torch.randn(tokens_BND.shape).to(dtype))
    assert pixels.grad is not None
    return tokens_BND.detach(), pixels.grad


@pytest.mark.parametrize("kind", VISION_ENCODERS)
def test_the_same_tokens_and_gradients_by_our_products(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = vision_encoder(kind)
    wanted = run(encoder.float(), torch.float32)
    encoder.to(torch.bfloat16)
    called = []
    ours = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *a, **k: called.append(1) or ours(*a, **k))
    with plain_attention(nn.ModuleList([encoder])) as count:
        assert count == 1
        found = run(encoder, torch.bfloat16)
    assert len(called) >= 2
    for a, b in zip(found, wanted, strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 3e-2
    called.clear()
    run(encoder, torch.bfloat16)
    assert called == []


def test_float32_keeps_torchs_bits() -> None:
    encoder = vision_encoder("clip", torch.float32)
    wanted = run(encoder, torch.float32)
    with plain_attention(encoder):
        found = run(encoder, torch.float32)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def test_another_attention_stays() -> None:
    encoder: Any = vision_encoder("clip")
    encoder.model.set_attn_implementation("eager")
    with plain_attention(encoder) as count:
        assert count == 0
        assert encoder.model.config._attn_implementation == "eager"


def test_an_error_within_leaves_torchs_attention() -> None:
    encoder: Any = vision_encoder("clip")
    with pytest.raises(RuntimeError, match="within"), plain_attention(encoder):
        assert encoder.model.config._attn_implementation == attention.ENCODERS
        raise RuntimeError("within")
    assert encoder.model.config._attn_implementation == "sdpa"


def test_causal_and_masked_attention_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, 4, 9, 8).to(torch.bfloat16) for _ in range(3))
    assert attention.faster(q, all_see_all=True)
    monkeypatch.setattr(attention, "attend", lambda *a, **k: pytest.fail("ours was taken"))
    module = nn.Identity()
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    attention.vision_attention(module, q, k, v, mask, is_causal=False)
    attention.vision_attention(module, q, k, v, None, is_causal=True)
    attention.vision_attention(module, q, k, v, None)  # a module that does not say is causal to transformers
    attention.vision_attention(module, q, k, v, None, dropout=0.5, is_causal=False)
    with pytest.raises(pytest.fail.Exception, match="ours"):
        attention.vision_attention(module, q, k, v, None, is_causal=False)
