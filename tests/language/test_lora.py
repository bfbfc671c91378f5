"""LoRA on any language model: no change before training, only its own weights, merged without a trace."""

from __future__ import annotations

import pytest
import torch

import tiny
from errors import refused
from opticnerve.language.adapters import ADAPTER
from opticnerve.language.lora import add_lora, has_lora, is_lora, linear_layers, merge_lora

IDS = torch.arange(12)[None]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fresh_adapters_change_nothing_and_merged_ones_stay(family: str) -> None:
    model = tiny.language_model(family, 300)
    keys, before = set(model.state_dict()), model(IDS).logits
    open_before = {n: p.requires_grad for n, p in model.named_parameters()}
    add_lora(model, {"rank": 3})
    assert has_lora(model)
    assert torch.equal(model(IDS).logits, before)
    assert {
        n.replace(".base_layer", ""): p.requires_grad for n, p in model.named_parameters() if not is_lora(n)
    } == open_before
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted = model(IDS).logits
    assert not torch.allclose(adapted, before, atol=1e-3)
    merge_lora(model)
    assert not has_lora(model)
    assert set(model.state_dict()) == keys
    torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-4, atol=1e-4)


def test_options() -> None:
    model = tiny.language_model("llama", 300)
    add_lora(model, {"rank": 4, "alpha": 12, "targets": ["q_proj", "v_proj"]}, dtype=torch.bfloat16)
    adapters = {n: p for n, p in model.named_parameters() if is_lora(n)}
    assert {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in adapters} == {"q_proj", "v_proj"}
    assert {p.dtype for p in adapters.values()} == {torch.bfloat16}
    assert model.model.layers[0].self_attn.q_proj.scaling == {ADAPTER: 3.0}


def test_bf16_weights_get_bf16_adapters() -> None:
    model = tiny.language_model("llama", 300).to(torch.bfloat16)
    add_lora(model, {})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_refusals() -> None:
    model = tiny.language_model("llama", 300)
    with refused("unknown-key", "['rnak']", "rank"):
        add_lora(model, {"rnak": 3})
    with refused("unknown-name", "q_proj"):
        add_lora(model, {"targets": ["query"]})
    add_lora(model, {})
    with refused("exists-already", "LoRA"):
        add_lora(model, {})


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_head_is_left_alone(family: str) -> None:
    model = tiny.language_model(family, 300)
    head = model.get_output_embeddings()
    assert all(model.get_submodule(n) is not head for n in linear_layers(model))
    assert len(linear_layers(model)) >= 8
