"""What others' attention kernels compute, in plain torch, by the signatures under which they are called."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_TOLIST = torch._C.TensorBase.tolist  # a pretended device replaces the method


@torch.library.custom_op("reference::varlen_attn", mutates_args=())
def _forward(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, starts_S: Tensor, scaling: float, window: int) -> Tensor:
    out_THD = torch.empty_like(q_THD)
    for a, b in _segments(starts_S):
        q, k, v = (_heads(t[a:b], q_THD) for t in (q_THD, k_TKD, v_TKD))
        out_THD[a:b] = (_weights(q, k, scaling, window) @ v).transpose(0, 1).to(out_THD.dtype)
    return out_THD


@torch.library.custom_op("reference::varlen_attn_backward", mutates_args=())
def _backward(
    grad_THD: Tensor, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, starts_S: Tensor, scaling: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(q_THD), torch.empty_like(k_TKD), torch.empty_like(v_TKD)
    for a, b in _segments(starts_S):
        q, k, v, grad = (_heads(t[a:b], q_THD) for t in (q_THD, k_TKD, v_TKD, grad_THD))
        p = _weights(q, k, scaling, window)
        dp = grad @ v.transpose(1, 2)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scaling
        for into, found in zip(grads, (ds @ k, ds.transpose(1, 2) @ q, p.transpose(1, 2) @ grad), strict=True):
            shared = found.unflatten(0, (into.shape[1], -1)).sum(1)
            into[a:b] = shared.transpose(0, 1).to(into.dtype)
    return grads


def _segments(starts_S: Tensor) -> list[tuple[int, int]]:
    assert starts_S.dtype == torch.int32
    starts = _TOLIST(starts_S)
    return list(zip(starts, starts[1:], strict=False))


def _heads(x_LHD: Tensor, q_THD: Tensor) -> Tensor:
    """(H, L, D) in float32, each key head as often as query heads share it."""
    return x_LHD.float().transpose(0, 1).repeat_interleave(q_THD.shape[1] // x_LHD.shape[1], 0)


def _weights(q: Tensor, k: Tensor, scaling: float, window: int) -> Tensor:
    length = q.shape[1]
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    if window >= 0:  # how many one sees beside itself
        sees = sees.triu(-window)
    return (q @ k.transpose(1, 2) * scaling).masked_fill(~sees, float("-inf")).softmax(-1)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _back(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad_THD.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None, None


_forward.register_fake(lambda q_THD, *_: torch.empty_like(q_THD))
_backward.register_fake(lambda grad, q, k, v, *_: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)))
_forward.register_autograd(_back, setup_context=_set_up)


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool | None = None,
) -> Tensor:  # fmt: skip
    """As `torch.nn.attention.varlen.varlen_attn`, causal."""
    assert cu_seq_k is cu_seq_q
    assert window_size[1] == 0
    assert enable_gqa in (None, key.shape[1] != query.shape[1])
    return _checked(query, key, value, cu_seq_q, max_q, max_k, scale, window_size[0])


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """As `flash_attn.flash_attn_varlen_func`, causal."""
    assert causal
    assert not dropout_p
    assert window_size[1] in (-1, 0)
    return _checked(q, k, v, cu_seqlens_q, max_seqlen_q, max_seqlen_k, softmax_scale, window_size[0])


def _checked(
    q: Tensor, k: Tensor, v: Tensor, starts_S: Tensor, longest_q: int, longest_k: int, scaling: float | None, window: int
) -> Tensor:  # fmt: skip
    assert longest_q == longest_k
    assert type(longest_q) is int
    assert scaling is not None
    out: Tensor = _forward(q, k, v, starts_S, scaling, window)
    return out


class Flex:
    """`torch.nn.attention.flex_attention`, in whose block mask each pair of positions is a block."""

    BlockMask = Tensor

    @staticmethod
    def create_block_mask(sees: Any, rows: int, heads: None, queries: int, keys: int, device: str) -> Tensor:
        row_B, i_L, j_L = (torch.arange(n, device=device) for n in (rows, queries, keys))
        mask: Tensor = sees(row_B[:, None, None], None, i_L[:, None], j_L[None, :])
        return mask

    @staticmethod
    def flex_attention(
        q: Tensor, k: Tensor, v: Tensor, *, block_mask: Tensor, scale: float, enable_gqa: bool, kernel_options: Any
    ) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=block_mask[:, None], scale=scale, enable_gqa=enable_gqa
        )  # fmt: skip
