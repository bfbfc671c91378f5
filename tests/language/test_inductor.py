"""Compiled norms and gated MLPs compute what the others do; where nothing can be compiled, it is said first."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from opticnerve import recipe
from opticnerve.ops.fused_layers import Functions, fuse_layers
from opticnerve.ops.inductor import inductor
from opticnerve.ops.kernels import KERNELS
from opticnerve.types import OpticNerveError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def compiled() -> Functions:
    if not any(shutil.which(name) for name in ("g++", "clang++")):
        pytest.skip("no C++ compiler is installed")
    return inductor(CPU)


def gradients(model: Any, length: int, dtype: torch.dtype) -> list[Tensor]:
    """Logits, and gradients of the input and of what trains."""
    torch.manual_seed(1)
    embeds = torch.randn(2, length, 32).to(dtype).requires_grad_()
    logits = model(inputs_embeds=embeds, use_cache=False).logits
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(2)
    return [logits.detach(), *torch.autograd.grad(logits, [embeds, *trained], torch.randn(logits.shape).to(dtype))]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_same_values_and_gradients(compiled: Functions, dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data.add_(torch.randn_like(p) * 0.3)
            p.requires_grad_("layers.0" in name)
    for length in (1, 5, 9):
        plain = gradients(model, length, dtype)
        with fuse_layers(model, compiled) as changed:
            ours = gradients(model, length, dtype)
        assert changed == 7
        for one, other in zip(ours, plain, strict=True):
            assert float((one.float() - other.float()).norm() / other.float().norm()) < bound


def test_what_cannot_be_compiled_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(function: Any, **options: Any) -> Any:
        def fails(*args: Any) -> Any:
            raise RuntimeError("No working C++ compiler found\nand much more")

        return fails

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(OpticNerveError, match=r"compile for cpu here \(No working C\+\+ compiler found\); install"):
        inductor(CPU)


def test_a_recipe_names_who_fuses() -> None:
    stage = {"name": "s", "train": {"connector": 1e-3}, "data": [{"path": "x.json"}], "steps": 1}
    for name in KERNELS:
        assert recipe.Stage(**stage, kernels=name).kernels == name  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="inductor"):
        recipe.Stage(**stage, kernels="triton")  # type: ignore[arg-type]
