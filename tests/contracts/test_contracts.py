"""Every registered part through the contract of its kind; a new name without a row in these tables fails."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

import tiny
from opticnerve import registry
from opticnerve.registry import Registry
from opticnerve.testing import check_connector, check_encoder, check_fusion


@dataclass
class Case:
    """A tiny part: the options that build it, and what the check is told of it."""

    options: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)


def vision(family: str) -> dict[str, Any]:
    return {"architecture": tiny.vision_config(family).to_dict()}


WHISPER = {
    "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 8,
    "max_source_positions": 100, "vocab_size": 20, "decoder_layers": 1, "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip

ENCODERS: dict[str, dict[str, Case]] = {
    "hf_vision": {
        # LLaVA-1.5's cut: the last of the three layers and the final norm take no part.
        "clip": Case(
            {**vision("clip_vision_model"), "layer": -2},
            {"unused": ("model.encoder.layers.2.", "model.post_layernorm.")},
        ),
        "clip, several layers": Case(
            {**vision("clip_vision_model"), "layer": [-2, -3], "class_token": "keep"},
            {"unused": ("model.encoder.layers.2.", "model.post_layernorm.")},
        ),
        # (SigLIP's attention pooling.)
        "siglip": Case(vision("siglip_vision_model"), {"unused": ("model.head.",)}),
        "siglip, another size": Case({**vision("siglip_vision_model"), "image_size": 48}, {"unused": ("model.head.",)}),
        "dinov2": Case(vision("dinov2"), {"unused": ("model.embeddings.mask_token",)}),
        "dinov2 with registers": Case(vision("dinov2_with_registers"), {"unused": ("model.embeddings.mask_token",)}),
        "vit": Case(vision("vit"), {"unused": ("model.pooler.",)}),
    },
    "timm": {
        "cnn": Case({"name": "test_efficientnet", "image_size": 64}, {"unused": ("model.classifier.",)}),
        "vit": Case({"name": "test_vit", "image_size": 64}, {"unused": ("model.head.",)}),
    },
    "pair": {
        "channels": Case(
            {
                "first": {"type": "hf_vision", **vision("siglip_vision_model")},
                "second": {"type": "hf_vision", **vision("dinov2"), "mean": [0.4, 0.5, 0.6]},
            },
            {"unused": ("first.model.head.", "second.model.embeddings.mask_token")},
        ),
        "tokens": Case(
            {
                "first": {"type": "hf_vision", **vision("clip_vision_model")},
                "second": {"type": "hf_vision", **vision("dinov2"), "class_token": "keep"},
                "join": "tokens",
            },
            # (CLIP's last norm is its pooler's.)
            {"unused": ("first.model.post_layernorm.", "second.model.embeddings.mask_token")},
        ),
    },
    "dual_encoder": {
        "siglip": Case(
            {"encoder": {"type": "hf_vision", **vision("siglip_vision_model")}}, {"unused": ("inner.model.head.",)}
        ),
    },
    "patches": {"small": Case({"image_size": 24, "patch_size": 6})},
    "whisper": {
        # (Its positions are sinusoids.)
        "two seconds": Case({"architecture": WHISPER}, {"unused": ("model.embed_positions.",)}),
        "one second, pooled": Case(
            {"architecture": WHISPER, "seconds": 1, "pool": 5}, {"unused": ("model.embed_positions.",)}
        ),
    },
}
CONNECTORS: dict[str, dict[str, Case]] = {
    "linear": {"as it comes": Case(), "without bias": Case({"bias": False})},
    "mlp": {"as it comes": Case(), "deep": Case({"depth": 3, "activation": "silu", "bias": False})},
    "pixel_shuffle": {
        "as it comes": Case(),
        "mlp": Case({"scale": 4, "depth": 2}),
    },
    "qformer": {
        "queries": Case({"num_queries": 4, "hidden_size": 32, "depth": 2, "heads": 2}),
        "instructed": Case(
            {"num_queries": 4, "hidden_size": 32, "depth": 2, "heads": 2, "instruct": True, "vocab_size": 50}
        ),
    },
    "resampler": {
        "small": Case({"num_latents": 5, "depth": 2, "heads": 4, "key_value_heads": 2, "head_dim": 8}),
        "no square": Case({"num_latents": 7, "depth": 1, "heads": 2, "key_value_heads": 2}, {"in_tokens": 11}),
    },
    "abstractor": {
        "as it comes": Case({"depth": 1}),
        "another width": Case({"depth": 2, "hidden_size": 40, "out_tokens": 9}),
    },
}
FUSIONS: dict[str, dict[str, Case]] = {
    "splice": {"as it comes": Case()},
    "cross_attention": {
        "as it comes": Case(),
        "in every layer": Case({"every": 1, "heads": 4, "gate": "vector"}),
    },
}
TABLES = [(registry.encoders, ENCODERS), (registry.connectors, CONNECTORS), (registry.fusions, FUSIONS)]


@pytest.mark.parametrize(("parts", "table"), TABLES, ids=lambda p: getattr(p, "kind", ""))
def test_every_registered_name_has_a_case(parts: Registry[Any], table: dict[str, dict[str, Case]]) -> None:
    own = {name for name in parts if parts.get(name).__module__.startswith("opticnerve.")}
    without = sorted(name for name in own if not table.get(name))
    assert not without, f"add tiny {parts.kind}s to tests/contracts/test_contracts.py: {', '.join(without)}"
    assert set(table) <= own


def cases() -> list[Any]:
    return [
        pytest.param(parts, name, case, id=f"{parts.kind}-{name}-{title}")
        for parts, table in TABLES
        for name, titles in table.items()
        for title, case in titles.items()
    ]


@pytest.mark.parametrize(("parts", "name", "case"), cases())
def test_contract(parts: Registry[Any], name: str, case: Case) -> None:
    checks: dict[str, Any] = {"encoder": check_encoder, "connector": check_connector, "fusion": check_fusion}
    checks[parts.kind](partial(parts.get(name), **case.options), **case.told)  # type: ignore[misc]
