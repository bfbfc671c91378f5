"""Attention within segments is attention with a mask over the rows, for outputs and gradients, on every path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rows import ROWS, layout
from torch import Tensor

from opticnerve.ops import attention, enabled
from opticnerve.ops.attention import attend
from opticnerve.ops.segments import Segments, segments_of
from opticnerve.ops.varlen import supported, within

pytestmark = pytest.mark.skipif(not enabled(), reason="OPTICNERVE_PLAIN switches it off")
WIDTHS: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**WIDTHS)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**{k: v for k, v in WIDTHS.items() if k != "head_dim"})),
    "mistral, window of 5": lambda: tf.MistralForCausalLM(tf.MistralConfig(**WIDTHS, sliding_window=5)),
    "gemma3, windows in every other layer": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**WIDTHS, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
    ),
    "phi3": lambda: tf.Phi3ForCausalLM(
        tf.Phi3Config(**{k: v for k, v in WIDTHS.items() if k != "head_dim"}, pad_token_id=0)
    ),
}


def sees(group_BL: Tensor, branch_BL: Tensor, positions_BL: Tensor, window: int | None = None) -> Tensor:
    """(B, L, L), straight from the definition."""
    same = group_BL[:, :, None] == group_BL[:, None, :]
    mine = (branch_BL[:, :, None] == branch_BL[:, None, :]) | (branch_BL[:, None, :] == 0)
    before = torch.ones(group_BL.shape[1], group_BL.shape[1], dtype=torch.bool).tril()
    near = positions_BL[:, :, None] - positions_BL[:, None, :] < (window or 10**6)
    return same & mine & before & near


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_language_model_computes_what_it_computes_with_a_mask(make: Callable[[], Any], rows: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation("sdpa")
    assert supported(model)
    group, branch, positions = layout(rows)
    real = group >= 0
    embeds = torch.randn(*group.shape, 32)
    window = getattr(model.config, "sliding_window", None)
    kinds = getattr(model.config, "layer_types", None) or []

    def run(segments: Segments | None, mask: Any) -> tuple[Tensor, Tensor]:
        given = embeds.clone().requires_grad_()
        with within(model, segments):
            out = model(inputs_embeds=given, position_ids=positions, attention_mask=mask, use_cache=False).logits[real]
        out.square().sum().backward()
        assert given.grad is not None
        return out.detach(), given.grad[real]

    masks = {
        kind: torch.zeros(1).masked_fill(~sees(group, branch, positions, wide), torch.finfo(torch.float32).min)[:, None]
        for kind, wide in (("full_attention", None), ("sliding_attention", window))
    }
    mask = masks if kinds else masks["full_attention" if window is None else "sliding_attention"]
    ours, theirs = run(segments_of(group, branch, positions), None), run(None, mask)
    assert (ours[0] - theirs[0]).abs().max() < 1e-5
    assert (ours[1] - theirs[1]).abs().max() < 1e-4


def test_rows_that_are_segments_are_left_where_they_are() -> None:
    assert segments_of(*layout(ROWS["one sample a row"])).rows
    assert not segments_of(*layout([[[3, 2]], [[4]]])).rows


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=4), min_size=1, max_size=3
    )
)
def test_every_position_is_in_one_segment_and_the_mask_is_the_definition(rows: Any) -> None:
    group, branch, positions = layout(rows)
    segments = segments_of(group, branch, positions)
    real = (group >= 0).flatten()
    if not segments.rows:
        laid = torch.cat([b.index_NL.flatten() for b in segments.buckets])
        assert segments.back_T is not None
        assert torch.equal(laid[segments.back_T][real], torch.arange(group.numel())[real])
        assert segments.back_T[real].unique().numel() == int(real.sum())
    for bucket in segments.buckets:
        for n, index_L in enumerate(bucket.index_NL):
            inside = index_L.unique()
            row, place = int(inside[0]) // group.shape[1], inside % group.shape[1]
            wanted = sees(group, branch, positions)[row][place][:, place]
            order = torch.ones_like(wanted).tril()
            mask_NLL = bucket.masked().mask_NLL
            found = order if mask_NLL is None else mask_NLL[n, : len(inside), : len(inside)]
            assert torch.equal(found, wanted)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("heads", "shared"), [(4, 1), (6, 3)])
@pytest.mark.parametrize("sight", ["causal", "window", "branches", "all"])
def test_products_over_heads_are_torchs_attention(
    dtype: torch.dtype, bound: float, heads: int, shared: int, sight: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_SCORES", 6 * 20 * 20 * 2)  # several parts, the last one smaller
    monkeypatch.setattr(attention, "QUERIES", 8)
    torch.manual_seed(1)
    count, length = 5, 20
    q, k, v = (torch.randn(count, h, length, 8).to(dtype) for h in (heads, heads // shared, heads // shared))
    rows = layout([[[10, 6, 4] if sight == "branches" else [20]]] * count)
    window = 7 if sight == "window" else None
    allowed = torch.ones(count, length, length, dtype=torch.bool) if sight == "all" else sees(*rows, window)
    mask = allowed if sight == "branches" else None
    out, grads = _run(lambda *a: attend(*a, 0.3, mask_NLL=mask, window=window, causal=sight != "all"), q, k, v)  # type: ignore[misc]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(shared, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None], scale=0.3)

    wanted, wanted_grads = _run(plain, q.float(), k.float(), v.float())
    assert _far(out, wanted) < bound
    for ours, theirs in zip(grads, wanted_grads, strict=True):
        assert _far(ours, theirs) < bound


def test_long_segments_take_torchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONGEST", {torch.float32: 4})
    torch.manual_seed(2)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    called = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or kernel(*a, **k))
    long = attend(q, k, v, 0.5), attend(q, k, v, 0.5, window=3)
    assert len(called) == 2
    monkeypatch.setattr(attention, "LONGEST", {torch.float32: 100})
    short = attend(q, k, v, 0.5), attend(q, k, v, 0.5, window=3)
    assert len(called) == 2
    for a, b in zip(long, short, strict=True):
        assert _far(a, b) < 1e-5


def _run(f: Callable[..., Tensor], *given: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [g.detach().clone().requires_grad_() for g in given]
    out = f(*leaves)
    torch.manual_seed(3)
    out.backward(torch.randn(out.shape).to(out.dtype))
    return out.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def _far(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())
