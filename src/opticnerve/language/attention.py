"""Causal attention of equally long segments, trained at the speed of matrix products on a CPU, too.

torch's CPU kernel for attention runs its backward pass at a fraction of what the same machine's matrix products do. At
the lengths of captions and short conversations a batch's scores are small, so plain products over a few heads at a time
are faster; the query heads that share a key head (grouped-query attention, Ainslie et al. 2023) go into one product.
As in FlashAttention (Dao et al. 2022, section 3.1) only queries, keys and values are kept for the backward pass, which
computes the weights again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST = 768
"""Positions up to which plain products are faster than torch's kernel on a CPU (see benchmarks/train.py)."""
_SCORES = 1 << 20
"""Scores to compute at a time: they should stay in the processor's cache."""


def attend(
    q_NHLD: Tensor,
    k_NKLD: Tensor,
    v_NKLD: Tensor,
    scaling: float,
    *,
    mask_NLL: Tensor | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> Tensor:
    """Softmax attention (N, H, L, D): each position sees itself and those before it in its segment.

    Args:
        mask_NLL: bool, who sees whom, instead of causal order. window: in causal order, how many positions back (itself
            included) one may see, as in Mistral; None for all. H is a multiple of K.
    """
    length = q_NHLD.shape[2]
    if window is not None and window < length:
        assert mask_NLL is None, "a mask knows its window"
        mask_NLL = torch.ones(1, length, length, dtype=torch.bool, device=q_NHLD.device).tril().triu(1 - window)
    grouped = (
        q_NHLD.device.type == "cpu" and length <= LONGEST and dropout == 0.0 and k_NKLD.shape[-1] == v_NKLD.shape[-1]
    )
    if grouped:
        out: Tensor = _Grouped.apply(q_NHLD, k_NKLD, v_NKLD, _additive(mask_NLL, length, q_NHLD), scaling)  # type: ignore[no-untyped-call]
        return out
    shared = q_NHLD.shape[1] // k_NKLD.shape[1]
    if shared > 1 and mask_NLL is not None:  # with a mask, CUDA's fast kernels want a key head for each query head
        k_NKLD, v_NKLD = (t.repeat_interleave(shared, 1) for t in (k_NKLD, v_NKLD))
    return F.scaled_dot_product_attention(
        q_NHLD, k_NKLD, v_NKLD, attn_mask=None if mask_NLL is None else mask_NLL[:, None], dropout_p=dropout,
        is_causal=mask_NLL is None, scale=scaling, enable_gqa=k_NKLD.shape[1] != q_NHLD.shape[1],
    )  # fmt: skip


def _additive(mask_NLL: Tensor | None, length: int, like: Tensor) -> Tensor:
    """(N or 1, L, L): 0 where one sees, the least number elsewhere."""
    sees = torch.ones(1, length, length, dtype=torch.bool).tril() if mask_NLL is None else mask_NLL
    return torch.zeros(sees.shape, dtype=like.dtype).masked_fill_(~sees, torch.finfo(like.dtype).min)


class _Grouped(torch.autograd.Function):
    """Products over whole heads, a few segments at a time."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q_NHLD: Tensor, k_NKLD: Tensor, v_NKLD: Tensor, mask_MLL: Tensor, scaling: float
    ) -> Tensor:
        segments, heads, length, width = q_NHLD.shape
        q = q_NHLD.reshape(segments, k_NKLD.shape[1], -1, width)  # (N, K, H/K · L, D): head h asks key head h // (H/K)
        out = torch.empty_like(q)
        ctx.scaling, ctx.heads = scaling, heads
        ctx.save_for_backward(q, k_NKLD, v_NKLD, mask_MLL)
        for some in _parts(segments, heads * length * length):
            p = _weights(q[some], k_NKLD[some], _of(mask_MLL, some), scaling)
            torch.matmul(p, v_NKLD[some], out=out[some])
        return out.view(segments, heads, length, width)

    @staticmethod
    def backward(ctx: Any, grad_NHLD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, mask_MLL = ctx.saved_tensors
        segments, length, width = len(q), k.shape[2], q.shape[3]
        grad = grad_NHLD.reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for some in _parts(segments, ctx.heads * length * length):
            p = _weights(q[some], k[some], _of(mask_MLL, some), ctx.scaling)
            dv[some] = p.transpose(-1, -2) @ grad[some]
            dp = grad[some] @ v[some].transpose(-1, -2)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dq[some] = ds @ k[some]
            dk[some] = ds.transpose(-1, -2) @ q[some]
        dq, dk = dq.mul_(ctx.scaling), dk.mul_(ctx.scaling)
        return dq.view(segments, ctx.heads, length, width), dk, dv, None, None


def _weights(q_NKQD: Tensor, k_NKLD: Tensor, mask_MLL: Tensor, scaling: float) -> Tensor:
    """(N, K, H/K · L, L): how much each query of each head takes from each position."""
    length = k_NKLD.shape[2]
    scores = (q_NKQD @ k_NKLD.transpose(-1, -2)).unflatten(2, (-1, length))
    return torch.softmax(torch.add(mask_MLL[:, None, None], scores, alpha=scaling), -1).flatten(2, 3)


def _parts(segments: int, scores: int) -> list[slice]:
    """Segments to compute together, each of so many scores."""
    step = max(1, _SCORES // scores)
    return [slice(i, i + step) for i in range(0, segments, step)]


def _of(mask_MLL: Tensor, some: slice) -> Tensor:
    return mask_MLL if len(mask_MLL) == 1 else mask_MLL[some]
