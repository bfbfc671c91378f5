"""Attention of equally long segments at the speed of matrix products, on a CPU, too.

torch's CPU kernel for attention takes two to four times as long as the products that it consists of, above all in
bfloat16 and in its backward pass. So here they are plain products over a block of queries at a time, whose scores stay
in the processor's cache; the query heads that share a key head (grouped-query attention, Ainslie et al. 2023) go into
one product. As in FlashAttention (Dao et al. 2022, section 3.1) only queries, keys and values are kept for the backward
pass, which computes the weights again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from opticnerve.common.private_names import attention_of, set_attention, softmax_backward
from opticnerve.encoders.base import Encoder
from opticnerve.ops import enabled, tell
from opticnerve.types import AutogradContext

LONGEST = {torch.bfloat16: 8192, torch.float32: 768}
"""Positions up to which plain products are faster than torch's kernel on a CPU (`benchmarks/attention.py`); in float32
only where not all see all."""
QUERIES = 128
"""Queries of a block; the last block of a segment has fewer."""
_SCORES = 1 << 20
"""Scores to compute at a time, of several segments where one has fewer."""


def attend(
    q_NHLD: Tensor,
    k_NKLD: Tensor,
    v_NKLD: Tensor,
    scaling: float,
    *,
    mask_NLL: Tensor | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    causal: bool = True,
) -> Tensor:
    """Softmax attention (N, H, L, D) within segments.

    Args:
        causal: each position sees itself and those before it; otherwise all of them.
        mask_NLL: bool, who sees whom, instead. window: in causal order, how many positions back (itself included) one
            may see, as in Mistral; None for all. H is a multiple of K.
    """
    length = q_NHLD.shape[2]
    if window is not None and window < length:
        assert mask_NLL is None, "a mask knows its window"
        mask_NLL = torch.ones(1, length, length, dtype=torch.bool, device=q_NHLD.device).tril().triu(1 - window)
    causal = causal and mask_NLL is None
    if q_NHLD.device.type == "meta":
        foreseen_NHLD: Tensor = _Foreseen.apply(q_NHLD, k_NKLD, v_NKLD)
        return foreseen_NHLD.transpose(1, 2)
    if (
        faster(q_NHLD, all_see_all=mask_NLL is None and not causal)
        and dropout == 0.0
        and k_NKLD.shape[-1] == v_NKLD.shape[-1]
    ):
        return products(q_NHLD, k_NKLD, v_NKLD, scaling, mask_NLL=mask_NLL, causal=causal)
    shared = q_NHLD.shape[1] // k_NKLD.shape[1]
    if shared > 1 and mask_NLL is not None:  # with a mask, CUDA's fast kernels want a key head for each query head
        k_NKLD, v_NKLD = (t.repeat_interleave(shared, 1) for t in (k_NKLD, v_NKLD))
    return F.scaled_dot_product_attention(
        q_NHLD, k_NKLD, v_NKLD, attn_mask=None if mask_NLL is None else mask_NLL[:, None], dropout_p=dropout,
        is_causal=causal, scale=scaling, enable_gqa=k_NKLD.shape[1] != q_NHLD.shape[1],
    )  # fmt: skip


class _Foreseen(torch.autograd.Function):
    """What a fused kernel keeps and computes, on the meta device: no scores, and products by blanks without memory,
    two forward, five backward. (N, L, H, D)."""

    @staticmethod
    def forward(ctx: AutogradContext, q_NHLD: Tensor, k_NKLD: Tensor, v_NKLD: Tensor) -> Tensor:
        segments, heads, length, _ = q_NHLD.shape
        out_NLHD = q_NHLD.new_empty(segments, length, heads, v_NKLD.shape[-1])
        ctx.save_for_backward(q_NHLD, k_NKLD, v_NKLD, out_NLHD)
        _computed(q_NHLD, k_NKLD, 1)
        _computed(q_NHLD, v_NKLD, 1)
        return out_NLHD

    @staticmethod
    def backward(ctx: AutogradContext, grad_NLHD: Tensor) -> tuple[Tensor, ...]:
        q_NHLD, k_NKLD, v_NKLD, _ = ctx.saved_tensors
        _computed(q_NHLD, k_NKLD, 3)
        _computed(q_NHLD, v_NKLD, 2)
        return torch.empty_like(q_NHLD), torch.empty_like(k_NKLD), torch.empty_like(v_NKLD)


def _computed(q_NHLD: Tensor, x_NKLD: Tensor, times: int) -> None:
    """Products of all scores with keys or values."""
    segments, heads, length, _ = q_NHLD.shape
    blank, (_, key_heads, keys, width) = q_NHLD.new_empty(1), x_NKLD.shape
    for _ in range(times):
        torch.bmm(
            blank.expand(segments * key_heads, heads // key_heads * length, keys),
            blank.expand(segments * key_heads, keys, width),
        )


def products(
    q_NHLD: Tensor, k_NKLD: Tensor, v_NKLD: Tensor, scaling: float, *, mask_NLL: Tensor | None = None, causal: bool
) -> Tensor:
    """`attend` by plain products, whether or not that is the faster way."""
    bias_MLL = None if mask_NLL is None else _bias(mask_NLL, q_NHLD.dtype)
    out: Tensor = _Grouped.apply(q_NHLD, k_NKLD, v_NKLD, bias_MLL, scaling, causal)
    return out.transpose(1, 2)


def faster(q_NHLD: Tensor, *, all_see_all: bool) -> bool:
    """Whether plain products are faster than torch's kernel for such queries."""
    longest = 0 if all_see_all and q_NHLD.dtype == torch.float32 else LONGEST.get(q_NHLD.dtype, 0)
    return q_NHLD.device.type == "cpu" and q_NHLD.shape[2] <= longest


def _bias(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where one sees, the least number elsewhere."""
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)


class _Grouped(torch.autograd.Function):
    """Products over whole heads: some segments, and of these some queries, at a time.

    In causal order a block of queries meets only the keys up to its own end, and a mask only at its own place.
    """

    @staticmethod
    def forward(
        ctx: AutogradContext,
        q_NHLD: Tensor,
        k_NKLD: Tensor,
        v_NKLD: Tensor,
        bias_MLL: Tensor | None,
        scaling: float,
        causal: bool,
    ) -> Tensor:
        k, v = k_NKLD.contiguous(), v_NKLD.contiguous()
        segments, heads, length, width = q_NHLD.shape
        out_NLHD = q_NHLD.new_empty(segments, length, heads, width)
        ctx.save_for_backward(q_NHLD, k, v, bias_MLL)
        ctx.scaling, ctx.causal = scaling, causal
        q, out = _by_key_head(q_NHLD, k), _by_key_head(out_NLHD.transpose(1, 2), k)
        for some, queries, keys in _blocks(segments, heads, length, causal=causal):
            bias = _bias_of(bias_MLL, some, queries, q, causal=causal)
            p = _weights(q[some, :, :, queries], k[some, :, keys], bias, scaling)
            out[some, :, :, queries] = (p @ v[some, :, keys]).unflatten(2, (q.shape[2], -1))
        return out_NLHD

    @staticmethod
    def backward(ctx: AutogradContext, grad_NLHD: Tensor) -> tuple[Tensor | None, ...]:
        q_NHLD, k, v, bias_MLL = ctx.saved_tensors
        segments, heads, length, _ = q_NHLD.shape
        dq_NLHD = torch.empty_like(grad_NLHD)
        q, grad, dq = (_by_key_head(t, k) for t in (q_NHLD, grad_NLHD.transpose(1, 2), dq_NLHD.transpose(1, 2)))
        dk, dv = (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))  # sums over blocks of queries
        for some, queries, keys in _blocks(segments, heads, length, causal=ctx.causal):
            q_some, g_some = q[some, :, :, queries].flatten(2, 3), grad[some, :, :, queries].flatten(2, 3)
            bias = _bias_of(bias_MLL, some, queries, q, causal=ctx.causal)
            p = _weights(q[some, :, :, queries], k[some, :, keys], bias, ctx.scaling)
            dv[some, :, keys] += p.transpose(-1, -2) @ g_some
            dp = g_some @ v[some, :, keys].transpose(-1, -2)
            ds = softmax_backward(dp, p)
            dq[some, :, :, queries] = (ds @ k[some, :, keys]).mul_(ctx.scaling).unflatten(2, (q.shape[2], -1))
            dk[some, :, keys] += ds.transpose(-1, -2) @ q_some
        return dq_NLHD.transpose(1, 2), dk.mul_(ctx.scaling).to(k.dtype), dv.to(v.dtype), None, None, None


def _by_key_head(t_NHLD: Tensor, k_NKLD: Tensor) -> Tensor:
    """(N, K, H/K, L, D): query head h asks key head h // (H/K)."""
    out: Tensor = t_NHLD.unflatten(1, (k_NKLD.shape[1], -1))
    return out


def _weights(q_NKGQD: Tensor, k_NKLD: Tensor, bias_MQL: Tensor | None, scaling: float) -> Tensor:
    """(N, K, G · Q, L): how much each of Q queries of each of G heads takes from each of L keys.

    A bias is that of the last keys, where there are more.
    """
    segments, key_heads, shared, queries, _ = q_NKGQD.shape
    scores = q_NKGQD.new_empty(segments, key_heads, shared, queries, k_NKLD.shape[2])
    if bias_MQL is not None:
        biased = bias_MQL.shape[-1]
        scores[..., :-biased] = 0
        scores[..., -biased:] = bias_MQL[:, None, None]
    # Scaled and added to the bias within the product: no further pass over the scores.
    flat = scores.view(segments * key_heads, shared * queries, -1)
    flat.baddbmm_(
        q_NKGQD.reshape(*flat.shape[:2], -1), k_NKLD.flatten(0, 1).transpose(1, 2),
        beta=0 if bias_MQL is None else 1, alpha=scaling,
    )  # fmt: skip
    return torch.softmax(scores, -1).flatten(2, 3)


def _blocks(segments: int, heads: int, length: int, *, causal: bool) -> Iterator[tuple[slice, slice, slice]]:
    """Segments, queries and keys to compute at a time."""
    for start in range(0, length, QUERIES):
        end = min(start + QUERIES, length)
        keys = end if causal else length
        step = max(1, _SCORES // (heads * (end - start) * keys))
        for i in range(0, segments, step):
            yield slice(i, i + step), slice(start, end), slice(0, keys)


def _bias_of(bias_MLL: Tensor | None, some: slice, queries: slice, like: Tensor, *, causal: bool) -> Tensor | None:
    """Of a block, (M, Q, L), M one or as many as its segments; in causal order (1, Q, Q); None where all see all."""
    if bias_MLL is not None:
        return bias_MLL[slice(None) if len(bias_MLL) == 1 else some, queries]
    if not causal:
        return None
    # Every layer of a step asks for the same. A graph keeps what it made itself, and looks into no cache of ours.
    make = _triangle if torch.compiler.is_compiling() else _known_triangle
    return make(queries.stop - queries.start, like.dtype, like.device)


def _triangle(queries: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _bias(torch.ones(1, queries, queries, dtype=torch.bool, device=device).tril(), dtype)


_known_triangle = lru_cache(maxsize=32)(_triangle)


# -- encoders ----------------------------------------------------------------------------------------------------------

ENCODERS = "opticnerve_encoders"


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[int]:
    """Within it, the encoders in `model` that have torch's attention have ours where it is faster; yields how many
    configurations say so. For a stage that trains, or sees all pictures for its cache; answers are torch's."""
    wrapped = (m for encoder in model.modules() if isinstance(encoder, Encoder) for m in encoder.modules())
    configs = {id(m.config): m.config for m in wrapped if isinstance(m, PreTrainedModel)}
    changed = []
    for config in configs.values() if enabled() else ():
        if attention_of(config) == "sdpa":
            changed.append(config)
            set_attention(config, ENCODERS)
        else:
            tell(f"the encoder {config.model_type} keeps its own attention ({attention_of(config)})")
    try:
        yield len(changed)
    finally:
        for config in changed:
            set_attention(config, "sdpa")


def vision_attention(
    module: nn.Module,
    query_BHLD: Tensor,
    key_BKLD: Tensor,
    value_BKLD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function by transformers' interface (`AttentionInterface`); returns (B, L, H, D) and no weights."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    all_see_all = attention_mask is None and not causal and query_BHLD.shape[2] == key_BKLD.shape[2]
    if not all_see_all or dropout:
        return sdpa_attention_forward(
            module, query_BHLD, key_BKLD, value_BKLD, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=is_causal, **kwargs,
        )  # fmt: skip
    scaling = query_BHLD.shape[-1] ** -0.5 if scaling is None else scaling
    out_BHLD = attend(query_BHLD, key_BKLD, value_BKLD, scaling, causal=False)
    return out_BHLD.transpose(1, 2).contiguous(), None


AttentionInterface.register(ENCODERS, vision_attention)
AttentionMaskInterface.register(ENCODERS, sdpa_mask)
