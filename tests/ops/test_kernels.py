"""Kernels stand where our own functions would and compute the same; where they cannot run, that is said first.

(Liger's need a GPU: here they are ours.)
"""

from __future__ import annotations

import importlib.util
import inspect
import shutil
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from errors import refused
from opticnerve import recipe
from opticnerve.ops import enabled, fused_layers
from opticnerve.ops.fused_layers import Functions, fuse_layers
from opticnerve.ops.kernels import KERNELS, functions_for, inductor, liger
from opticnerve.types import OpticNerveError

pytestmark = pytest.mark.skipif(not enabled(), reason="OPTICNERVE_PLAIN switches it off")
CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def tiny() -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).eval().requires_grad_(False)


class Spy:
    """A function in Liger's place, which takes what Liger's takes."""

    def __init__(self, own: Any) -> None:
        self.own, self.calls = own, 0

    def norm(self, x: Any, w: Any, eps: float, offset: float, casting_mode: str, in_place: bool) -> Any:
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        self.calls += 1
        return self.own.apply(x, w, eps)

    def swiglu(self, gate: Any, up: Any) -> Any:
        self.calls += 1
        return self.own.apply(gate, up)


@pytest.fixture
def spies(monkeypatch: pytest.MonkeyPatch) -> tuple[Spy, Spy]:
    norm, swiglu = Spy(fused_layers._RMSNorm), Spy(fused_layers._SwiGLU)
    package, ops = ModuleType("liger_kernel"), ModuleType("liger_kernel.ops")
    ops.LigerRMSNormFunction = type("F", (), {"apply": staticmethod(norm.norm)})  # type: ignore[attr-defined]
    ops.LigerSiLUMulFunction = type("F", (), {"apply": staticmethod(swiglu.swiglu)})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    return norm, swiglu


def test_they_are_used_within_the_stage_and_not_after(spies: tuple[Spy, Spy]) -> None:
    model = tiny()
    embeds = torch.randn(2, 5, 32, requires_grad=True)

    def gradient() -> torch.Tensor:
        logits = model(inputs_embeds=embeds, use_cache=False).logits
        [grad] = torch.autograd.grad(logits.square().sum(), [embeds])
        return grad

    before = gradient()
    with fuse_layers(model, liger(CUDA)) as changed:
        within = gradient()
    assert changed == 7
    assert [spy.calls for spy in spies] == [5, 2]
    torch.testing.assert_close(within, before, rtol=1e-5, atol=1e-5)
    gradient()
    assert [spy.calls for spy in spies] == [5, 2]


def test_refused_without_a_gpu(spies: tuple[Spy, Spy]) -> None:
    with refused("unsupported", "liger", "cpu"):
        liger(torch.device("cpu"))


def test_a_model_without_such_layers_is_told(spies: tuple[Spy, Spy]) -> None:
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    with (
        refused("unsupported", "GPT2LMHeadModel"),
        fuse_layers(model, liger(CUDA), required=True),
    ):
        pass


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    with refused("not-installed", "pip install 'opticnerve[liger]'"):
        liger(CUDA)


def test_a_recipe_takes_one_way_to_fuse() -> None:
    stage = {"name": "s", "train": {"connector": 1e-3}, "data": [{"path": "x.json"}], "steps": 1}
    assert recipe.Stage(**stage, kernels="liger").kernels == "liger"
    with pytest.raises(ValueError, match="keep one of them"):
        recipe.Stage(**stage, kernels="liger", compile=True)


def test_on_a_gpu_who_is_there_computes(spies: tuple[Spy, Spy], monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(device: torch.device) -> Functions:
        raise OpticNerveError("there is no Triton", kind="not-installed")

    assert functions_for(CPU) == (fused_layers.OWN, "opticnerve")
    chosen, name = functions_for(CUDA)
    assert name == "liger"
    embeds, model = torch.randn(2, 5, 32), tiny()
    with fuse_layers(model, chosen):
        model(inputs_embeds=embeds)
    assert [spy.calls for spy in spies] == [5, 2]
    assert functions_for(CUDA, layers_compiled=True) == (None, "torch.compile, with the layers")
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    monkeypatch.setitem(KERNELS, "inductor", lambda device: fused_layers.OWN)
    assert functions_for(CUDA) == (fused_layers.OWN, "inductor")
    monkeypatch.setitem(KERNELS, "inductor", cannot)
    assert functions_for(CUDA) == (None, "transformers")
    with fuse_layers(model, None) as changed:
        assert changed == 0
    with refused("not-installed", "Triton"):
        functions_for(CUDA, "inductor")
    monkeypatch.setenv("OPTICNERVE_PLAIN", "1")
    assert functions_for(CUDA) == (fused_layers.OWN, "opticnerve")


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_the_package_takes_what_we_give() -> None:
    from liger_kernel.ops import LigerRMSNormFunction, LigerSiLUMulFunction

    norm = inspect.signature(LigerRMSNormFunction.forward).bind("ctx", "x", "w", 1e-5, 0.0, "llama", False).arguments
    assert norm == {"ctx": "ctx", "X": "x", "W": "w", "eps": 1e-5, "offset": 0.0, "casting_mode": "llama",
                    "in_place": False}  # fmt: skip
    assert list(inspect.signature(LigerSiLUMulFunction.forward).bind("ctx", "a", "b").arguments) == ["ctx", "a", "b"]


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
    with refused("not-installed", "cpu", "No working C++ compiler found"):
        inductor(CPU)


def test_a_recipe_names_who_fuses() -> None:
    stage = {"name": "s", "train": {"connector": 1e-3}, "data": [{"path": "x.json"}], "steps": 1}
    for name in KERNELS:
        assert recipe.Stage(**stage, kernels=name).kernels == name
    with pytest.raises(ValueError, match="inductor"):
        recipe.Stage(**stage, kernels="triton")
