"""Fused layers compute what transformers' and peft's do: forward, backward, and only where they are the same."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from opticnerve.language.lora import adapter_on, add_lora
from opticnerve.ops import enabled
from opticnerve.ops.fused_layers import GATED_MLPS, NORMS, fuse_layers

pytestmark = pytest.mark.skipif(not enabled(), reason="OPTICNERVE_PLAIN switches it off")

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
# Norms and gated MLPs of two layers, and the last norm.
KNOWN = {
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, 7),
    "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, 7),
    "mistral": (tf.MistralConfig, tf.MistralForCausalLM, 7),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, 11),  # and norms of queries and keys
    "gemma": (tf.GemmaConfig, tf.GemmaForCausalLM, 0),  # its norm adds one to the weight, its MLP has a GELU
    "gpt2": (tf.GPT2Config, tf.GPT2LMHeadModel, 0),
}


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    config, model, _ = KNOWN[family]
    torch.manual_seed(0)
    sizes = SIZES if family != "gpt2" else {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    made = model(config(**sizes)).to(dtype).eval().requires_grad_(False)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "norm" in name:
                p.add_(torch.randn_like(p) * 0.3)
    return made


def run(model: Any, rows_B: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, and gradients of the input and of whatever trains."""
    torch.manual_seed(1)
    embeds = torch.randn(3, 7, 32).to(model.dtype).requires_grad_()
    model.zero_grad(set_to_none=True)
    with adapter_on(model, rows_B):
        out = model(inputs_embeds=embeds, use_cache=False).logits
    torch.manual_seed(2)
    out.backward(torch.randn(out.shape).to(out.dtype))
    assert embeds.grad is not None
    return out.detach(), embeds.grad, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def far(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-9))


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_same_bits_forward_and_the_same_gradients(family: str, dtype: torch.dtype, bound: float) -> None:
    model = make(family, dtype)
    plain = run(model)
    with fuse_layers(model) as count:
        ours = run(model)
    assert count == KNOWN[family][2]
    assert torch.equal(ours[0], plain[0])
    assert far(ours[1], plain[1]) < bound
    assert not any("forward" in vars(m) for m in model.modules())


def test_norms_that_train_get_their_gradient() -> None:
    model = make("llama")
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name or "gate_proj" in name)
    plain = run(model)[2]
    with fuse_layers(model):
        ours = run(model)[2]
    assert set(ours) == set(plain)
    for name, grad in plain.items():
        assert far(ours[name], grad) < 1e-5, name


@pytest.mark.parametrize("when", ["always", "media"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # Qwen2 has biases
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_adapters_give_peft_s_values_and_gradients(family: str, when: str, dtype: torch.dtype, bound: float) -> None:
    model = with_lora(family, dtype, when=when)
    rows = torch.tensor([True, False, True]) if when == "media" else None
    plain = run(model, rows)
    with fuse_layers(model) as count:
        ours = run(model, rows)
    assert count == KNOWN[family][2] + 14  # seven linear layers in each of two
    assert far(ours[0], plain[0]) < bound
    assert far(ours[1], plain[1]) < bound
    assert set(ours[2]) == set(plain[2])
    for name, grad in plain[2].items():
        assert far(ours[2][name], grad) < bound, name


def test_rows_that_the_adapter_leaves_alone_keep_the_bare_model_s_bits() -> None:
    bare, model = make("llama"), with_lora("llama", torch.float32, when="media")
    wanted = run(bare)[0]
    with fuse_layers(model):
        out = run(model, torch.tensor([True, False, False]))[0]
    assert torch.equal(out[1:], wanted[1:])
    assert not torch.equal(out[0], wanted[0])


@pytest.mark.parametrize("what", ["dropout", "dora", "merged", "open base"])
def test_adapters_that_do_more_are_left_to_peft(what: str) -> None:
    model = with_lora("llama", torch.float32, dropout=0.5 if what == "dropout" else 0.0)
    if what == "dropout":
        model.train()
    layers = [m for m in model.modules() if hasattr(m, "base_layer")]
    for layer in layers:
        if what == "merged":
            layer.merge()
        if what == "dora":
            layer.lora_variant["default"] = object()
        if what == "open base":
            layer.base_layer.requires_grad_(True)
    with fuse_layers(model) as count:
        assert count == KNOWN["llama"][2]
        assert not any("forward" in vars(layer) for layer in layers)


def test_a_layer_of_the_same_name_that_computes_something_else_is_left_alone() -> None:
    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(4)), 1e-6

        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2 * self.weight * hidden_states

    with fuse_layers(LlamaRMSNorm()) as count:
        assert count == 0


@pytest.mark.parametrize("name", sorted(NORMS | GATED_MLPS))
def test_every_listed_class_computes_what_it_is_listed_for(name: str) -> None:
    """In the installed transformers: forward to the bit, and gradients of all weights."""
    module, _, cls = name.rpartition(".")
    made: Any = getattr(importlib.import_module(module), cls)
    torch.manual_seed(0)
    if name in NORMS:
        layer = made(32, 1e-5)
        nn.init.normal_(layer.weight)
    else:
        layer = made(tf.LlamaConfig(**SIZES, use_bias=False))  # type: ignore[call-arg]
    x = torch.randn(3, 5, 32)

    def gradients() -> list[Tensor]:
        given = x.clone().requires_grad_()
        out = layer(given)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [given, *layer.parameters()])]

    plain = gradients()
    with fuse_layers(layer) as count:
        ours = gradients()
    assert count == 1
    assert torch.equal(ours[0], plain[0])
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def with_lora(family: str, dtype: torch.dtype, **options: Any) -> Any:
    model = make(family, dtype)
    torch.manual_seed(3)
    add_lora(model, {"rank": 4, **options})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.2)
                p.requires_grad_(True)
    return model
