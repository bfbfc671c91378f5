"""Whoever computes attention within segments computes the same; who does it is a table, told once."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as tf
from packed_rows import ROWS, layout
from torch import Tensor
from torch.nn.attention import flex_attention

import reference_attention
from errors import refused
from opticnerve.ops import enabled, packed_attention, varlen
from opticnerve.ops.packed_attention import ATTENTIONS, Case, block_mask, choose
from opticnerve.ops.segments import segments_of
from opticnerve.ops.varlen import attention_by, current, within
from pretend_device import pretended

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAIN_ROWS = {name: rows for name, rows in ROWS.items() if "branches" not in name}
USUAL: dict[str, Any] = {
    "device": CUDA, "dtype": torch.bfloat16, "head_dim": 64, "value_dim": 64, "branches": False, "dropout": 0.0,
}  # fmt: skip


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 2 is installed."""
    function = reference_attention.flash_attn_varlen_func
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(packed_attention._flash_functions, 2, function)
    monkeypatch.setattr(packed_attention, "is_flash_attn_2_available", lambda: True)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An NVIDIA GPU, Triton and torch's kernel are there; who computes is chosen anew."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(packed_attention, "varlen_attn", reference_attention.varlen_attn)
    monkeypatch.setattr(packed_attention.importlib.util, "find_spec", lambda name: name)
    choose.cache_clear()
    yield
    choose.cache_clear()


@pytest.fixture
def flex_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention step by step, and on a CPU both ways, which torch leaves out."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


def computed(name: str, rows: list[list[list[int]]], window: int | None, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients at the positions that belong to a sample."""
    torch.manual_seed(0)
    group, branch, positions = layout(rows)
    segments, real = segments_of(group, branch, positions).masked(), group >= 0
    shapes = [(len(group), heads, group.shape[1], 16) for heads in (6, 2, 2)]
    given = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    out_BLHD = ATTENTIONS[name].attend(segments, 0.3, 0.0, window, *given)
    out_BLHD.float()[real].square().sum().backward()
    grads = [g.grad.transpose(1, 2) for g in given if g.grad is not None]
    return [t.detach()[real].float() for t in (out_BLHD, *grads)]


def same(name: str, rows: list[list[list[int]]], window: int | None, dtype: torch.dtype) -> None:
    ours, theirs = computed(name, rows, window, dtype), computed("buckets", rows, window, dtype)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * b.norm()


@pytest.mark.usefixtures("cuda", "flash_attn")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("rows", PLAIN_ROWS.values(), ids=PLAIN_ROWS.keys())
@pytest.mark.parametrize("name", ["flash", "varlen"])
def test_varlen_kernels_are_told_what_buckets_are(name: str, rows: Any, window: int | None, dtype: torch.dtype) -> None:
    same(name, rows, window, dtype)


@pytest.mark.usefixtures("flex_backward")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_flex_attention_is_told_what_buckets_are(rows: Any, window: int | None) -> None:
    same("flex", rows, window, torch.float32)


def test_the_layout_covers_the_batch_once() -> None:
    group, branch, positions = layout([[[7], [3]], [[4, 2, 2]]])
    segments = segments_of(group, branch, positions)
    assert segments.starts_S.tolist() == [0, 7, 10, 18, 20]  # the last is padding
    assert segments.longest == 8
    assert segments.branches
    assert not segments_of(*layout([[[7], [3]]])).branches


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("varlen", {}),
        ("varlen", {"dtype": torch.float16}),
        ("flex", {"dtype": torch.float32}),
        ("flex", {"branches": True}),
        ("flex", {"head_dim": 192, "value_dim": 128}),
        ("flex", {"head_dim": 512, "value_dim": 512}),
        ("flex", {"head_dim": 20, "value_dim": 20}),
        ("buckets", {"dropout": 0.1}),
        ("buckets", {"branches": True, "head_dim": 8, "value_dim": 8}),
        ("buckets", {"device": CPU}),
    ],
)
@pytest.mark.usefixtures("cuda")
def test_the_first_that_can_computes(name: str, case: dict[str, Any]) -> None:
    assert choose(Case(**USUAL | case)) == name


@pytest.mark.usefixtures("cuda", "flash_attn")
def test_an_installed_flash_attention_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(packed_attention, "tell", told.append)
    assert choose(Case(**USUAL)) == "flash"
    assert choose(Case(**USUAL | {"dropout": 0.1})) == "flash"
    assert choose(Case(**USUAL | {"branches": True})) == "flex"
    assert [line.split(";")[0] for line in told] == [
        "attention within segments: flash (FlashAttention's varlen kernel)",
        "attention within segments: flash (FlashAttention's varlen kernel)",
        "attention within segments with branches: flex (FlexAttention, compiled)",
    ]
    assert "flash has no branches" in told[-1]


@pytest.mark.usefixtures("cuda")
def test_a_flash_attention_of_another_torch_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert choose(Case(**USUAL)) == "varlen"


@pytest.mark.usefixtures("cuda")
def test_what_this_torch_lacks_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "_TAKES", {"query", "key", "value", "is_causal"})  # 2.10's
    assert choose(Case(**USUAL)) == "flex"
    monkeypatch.setattr(packed_attention.importlib.util, "find_spec", lambda name: None)
    choose.cache_clear()
    assert choose(Case(**USUAL)) == "buckets"


def test_torch_has_the_signature_that_is_used() -> None:
    from torch.nn.attention.varlen import varlen_attn

    found = inspect.signature(varlen_attn).parameters
    assert set(inspect.signature(reference_attention.varlen_attn).parameters) <= {*found, "enable_gqa"}


def small() -> Any:
    torch.manual_seed(0)
    config = tf.MistralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    model = tf.MistralForCausalLM(config).eval()
    model.set_attn_implementation("sdpa")
    return model


@pytest.mark.skipif(not enabled(), reason="OPTICNERVE_PLAIN switches it off")
class TestAStage:
    def test_names_who_computes(self) -> None:
        model = small()
        segments = segments_of(*layout(ROWS["branches"]))
        with attention_by(model, None), within(model, segments):
            assert current().kernel == "buckets"
        for name in ("flash", "varlen", "flex"):
            with refused("unsupported", f"attention: {name}", "CUDA"), attention_by(model, name):
                pass
        with refused("unsupported", "attention"), attention_by(None, "buckets"):
            pass

    @pytest.mark.usefixtures("flex_backward")
    def test_has_its_block_masks_before_its_first_layer_and_layers_compile_whole(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(varlen, "choose", lambda *_: "flex")
        model, (group, branch, positions) = small(), layout(ROWS["branches and plain, packed"])
        embeds, plain = torch.randn(*group.shape, 64), segments_of(group, branch, positions)

        def run(change: Callable[[Any], None]) -> Tensor:
            changed = small()
            change(changed)
            with torch.no_grad(), within(changed, plain):
                assert set(current().block_masks) == {None, 4}
                return changed(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits[group >= 0]

        torch._dynamo.reset()  # type: ignore[no-untyped-call]
        breaks = torch._dynamo.utils.counters["graph_break"]
        breaks.clear()
        whole = run(lambda m: [layer.compile(backend="eager") for layer in m.model.layers])
        assert not breaks
        assert (run(lambda m: None) - whole).abs().max() < 1e-5
        monkeypatch.setattr(varlen, "choose", lambda *_: "buckets")
        with torch.no_grad(), within(model, plain):
            wanted = model(inputs_embeds=embeds, position_ids=positions, use_cache=False).logits[group >= 0]
        assert (wanted - whole).abs().max() < 1e-5


def test_block_masks_wait_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = segments_of(*layout(ROWS["branches and plain, packed"]))
    wanted = block_mask(segments, 3)
    with pretended() as device:
        monkeypatch.setattr(packed_attention, "flex", flex_attention)
        there = segments.to("cuda")
        device.reset()
        made = block_mask(there, 3)
        # vmap's own places are made where the pretended device's numbers really lie.
        assert {what for what, _ in device.waits} <= {"index by a tensor of the host"}
    assert torch.equal(made.kv_indices, wanted.kv_indices)
    assert torch.equal(made.kv_num_blocks, wanted.kv_num_blocks)
