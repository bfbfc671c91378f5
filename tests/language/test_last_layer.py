"""The last MLP at the positions that are read: the same logits and gradients there, and only where that is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from opticnerve.language.lora import adapter_on, add_lora
from opticnerve.objectives.head import supervised_logits
from opticnerve.ops.fused_layers import fuse_layers
from opticnerve.ops.last_mlp import last_mlp_at

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
KNOWN = {
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM),
    "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM),
    "mistral": (tf.MistralConfig, tf.MistralForCausalLM),
    "smollm3": (tf.SmolLM3Config, tf.SmolLM3ForCausalLM),
    "gemma": (tf.GemmaConfig, tf.GemmaForCausalLM),
}
# A norm behind the MLP; layers that mix experts, whose router looks at all positions; no such layers at all.
UNKNOWN = {
    "olmo2": (tf.Olmo2Config, tf.Olmo2ForCausalLM),
    "mixtral": (tf.MixtralConfig, tf.MixtralForCausalLM),
    "qwen3_moe": (tf.Qwen3MoeConfig, tf.Qwen3MoeForCausalLM),
}
KEEP = torch.tensor([[0, 0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 1]], dtype=torch.bool)


def make(kinds: dict[str, Any], family: str) -> Any:
    config, model = kinds[family]
    torch.manual_seed(0)
    return model(config(**SIZES)).eval()


def with_lora(**options: Any) -> Any:
    model = make(KNOWN, "llama").requires_grad_(False)
    add_lora(model, {"rank": 4, **options})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.2)
                p.requires_grad_(True)
    return model


def seen_by_last_mlp(model: Any) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    model.get_decoder().layers[-1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    return seen


def run(model: Any, *, everywhere: bool, rows_B: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits at the kept positions, and all gradients."""
    torch.manual_seed(1)
    embeds = torch.randn(*KEEP.shape, 32, requires_grad=True)
    model.zero_grad(set_to_none=True)
    with adapter_on(model, rows_B):
        if everywhere:
            logits_MV = model(inputs_embeds=embeds, use_cache=False).logits[KEEP]
        else:
            logits_MV = supervised_logits(model, KEEP, inputs_embeds=embeds)
    torch.manual_seed(2)
    (logits_MV * torch.randn_like(logits_MV)).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert embeds.grad is not None
    return logits_MV.detach(), {**found, "input": embeds.grad}


def check_same(model: Any, rows_B: Tensor | None = None) -> None:
    wanted, ours = run(model, everywhere=True, rows_B=rows_B), run(model, everywhere=False, rows_B=rows_B)
    assert torch.allclose(ours[0], wanted[0], atol=1e-5)
    assert set(ours[1]) == set(wanted[1])
    for name, grad in wanted[1].items():
        assert torch.allclose(ours[1][name], grad, atol=1e-5), name


@pytest.mark.parametrize("family", KNOWN)
def test_the_same_logits_and_gradients_of_fewer_positions(family: str) -> None:
    model = make(KNOWN, family)
    check_same(model)
    seen = seen_by_last_mlp(model)
    run(model, everywhere=False)
    assert seen == [(1, int(KEEP.sum()), 48)]
    run(model, everywhere=True)
    assert seen[1:] == [(*KEEP.shape, 48)]  # nothing is left behind


def test_with_lean_layers_and_adapters() -> None:
    model = with_lora()
    with fuse_layers(model):
        check_same(model)
        assert applies(model)


def test_an_adapter_that_asks_for_the_row_keeps_all_positions() -> None:
    model = with_lora(when="media")
    check_same(model, torch.tensor([True, False, False]))
    with adapter_on(model, torch.tensor([True, False, False])):
        assert not applies(model)
    with adapter_on(model, torch.tensor([True])), last_mlp_at(model, torch.tensor([2]), rows=1) as does:
        assert does


@pytest.mark.parametrize("family", UNKNOWN)
def test_families_that_may_do_more_are_left_alone(family: str) -> None:
    model = make(UNKNOWN, family)
    assert not applies(model)
    check_same(model)


def test_layers_computed_twice_are_left_alone() -> None:
    model = make(KNOWN, "llama").train()
    assert applies(model)
    model.gradient_checkpointing_enable()
    assert not applies(model)
    check_same(model)


def test_nothing_to_read() -> None:
    model = make(KNOWN, "llama")
    with last_mlp_at(model, torch.tensor([], dtype=torch.long), rows=3) as does:
        assert not does


def test_an_error_within_leaves_nothing_behind() -> None:
    model = make(KNOWN, "llama")
    with pytest.raises(RuntimeError, match="within"), last_mlp_at(model, torch.tensor([1]), rows=1):
        raise RuntimeError("within")
    mlp = model.get_decoder().layers[-1].mlp
    assert not mlp._forward_hooks
    assert not mlp._forward_pre_hooks


def applies(model: Any) -> bool:
    with last_mlp_at(model, KEEP.flatten().nonzero().squeeze(1), rows=len(KEEP)) as does:
        return does
