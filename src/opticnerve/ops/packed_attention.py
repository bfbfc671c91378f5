"""Who computes attention within the segments of packed rows: the fastest kernel that is there for what is asked.

On CUDA FlashAttention's `varlen` kernels (Dao 2023, FlashAttention-2, section 3) are told where segments begin. Where
the package is missing, torch has them, too; where segments have branches, or numbers 32 bits, FlexAttention (Dong et
al. 2024) is compiled once and told by blocks who sees whom. What is left, and a CPU, lays segments of like length
beside each other: only pairs within a segment are computed, in plain torch, on any device.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from opticnerve.ops import tell
from opticnerve.ops.attention import attend
from opticnerve.ops.segments import Bucket, Segments
from opticnerve.types import AutogradContext, OpticNerveError

varlen_attn: Callable[..., Any] | None = None
if importlib.util.find_spec("torch.nn.attention.varlen") is not None:  # torch 2.10 and later
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
_TAKES = set() if varlen_attn is None else set(inspect.signature(varlen_attn).parameters)


@dataclass(frozen=True)
class Case:
    """What attention is asked for. `value_dim`: of a value's head, which some families make another than a key's
    `head_dim`. `branches`: whether samples share a beginning. `dropout`: of attention's weights."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    branches: bool
    dropout: float


@dataclass(frozen=True)
class Attention:
    """One who computes.

    `what`: for people. `missing`: why it cannot, None where it can. `attend`: of segments, scaling, dropout, sliding
    window, queries (B, H, L, D), keys and values (B, K, L, D) the output (B, L, H, D).
    """

    what: str
    missing: Callable[[Case], str | None]
    attend: Callable[[Segments, float, float, int | None, Tensor, Tensor, Tensor], Tensor]


@lru_cache(maxsize=64)
def choose(case: Case, wanted: str | None = None) -> str:
    """The name of who computes, told once: `wanted`, or the first of `ATTENTIONS` that can.

    Raises:
        OpticNerveError: the wanted one cannot.
    """
    reasons = {name: attention.missing(case) for name, attention in ATTENTIONS.items()}
    if wanted is not None and (reason := reasons[wanted]) is not None:
        able = ", ".join(name for name, r in reasons.items() if r is None)
        raise OpticNerveError(f"attention: {wanted} {reason}; here can: {able}, or leave it out", kind="unsupported")
    name = wanted or next(name for name, reason in reasons.items() if reason is None)
    passed = [f"{other} {r}" for other, r in reasons.items() if r is not None and wanted is None]
    tell(
        f"attention within segments{' with branches' if case.branches else ''}: {name} ({ATTENTIONS[name].what})"
        + "".join(f"; {reason}" for reason in passed)
    )
    return name


# -- FlashAttention, the package's and torch's -------------------------------------------------------------------------


def _no_flash(case: Case) -> str | None:
    if (reason := _no_varlen_kernel(case)) is not None:
        return reason
    _import_flash()
    if 2 not in _flash_functions and (3 not in _flash_functions or case.dropout):
        return "is not there: flash-attn is not installed, or cannot be imported"
    return None


_flash_functions: dict[int, Callable[..., Any]] = {}
"""`flash_attn_varlen_func` of FlashAttention 2 and 3, as far as they are there."""


def _import_flash() -> None:
    """Now, not within a layer that is compiled. A wheel of another torch's cannot be imported."""
    _flash_functions.clear()
    hopper = torch.cuda.get_device_capability()[0] == 9
    for version, there, module in (
        (2, is_flash_attn_2_available(), "flash_attn"),
        (3, hopper and is_flash_attn_3_available(), "flash_attn_interface"),
    ):
        if there:
            try:
                _flash_functions[version] = importlib.import_module(module).flash_attn_varlen_func
            except ImportError as e:
                tell(f"{module} is installed, but cannot be imported: {e}")


def _no_torch_varlen(case: Case) -> str | None:
    if (reason := _no_varlen_kernel(case)) is not None:
        return reason
    if case.dropout:
        return "has no dropout"
    if "window_size" not in _TAKES:
        return "is not in this torch (2.11 has it)"
    return None


def _no_varlen_kernel(case: Case) -> str | None:
    """What FlashAttention's kernels do not do, whoever ships them."""
    if case.device.type != "cuda":
        return "is for CUDA"
    if torch.cuda.get_device_capability()[0] < 8:
        return "needs an NVIDIA GPU from Ampere on"
    if case.dtype not in (torch.bfloat16, torch.float16):
        return "computes in 16 bits"
    if case.head_dim != case.value_dim or case.head_dim % 8 or case.head_dim > 256:
        return f"has no heads of {case.head_dim} and {case.value_dim}"
    return "has no branches" if case.branches else None


def _flash(
    segments: Segments, scaling: float, dropout: float, window: int | None, query_BHLD: Tensor, key_BKLD: Tensor,
    value_BKLD: Tensor,
) -> Tensor:  # fmt: skip
    version = 3 if 3 in _flash_functions and not dropout else 2
    options = {"dropout_p": dropout} if version == 2 else {}
    out = _flash_functions[version](
        *map(_flat, (query_BHLD, key_BKLD, value_BKLD)), cu_seqlens_q=segments.starts_S, cu_seqlens_k=segments.starts_S,
        max_seqlen_q=segments.longest, max_seqlen_k=segments.longest, softmax_scale=scaling, causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0), **options,
    )  # fmt: skip
    out_THD: Tensor = out[0] if isinstance(out, tuple) else out  # early versions of 3 give the weights' sums, too
    return _by_row(out_THD, query_BHLD)


def _torch_varlen(
    segments: Segments, scaling: float, dropout: float, window: int | None, query_BHLD: Tensor, key_BKLD: Tensor,
    value_BKLD: Tensor,
) -> Tensor:  # fmt: skip
    assert varlen_attn is not None
    grouped = key_BKLD.shape[1] != query_BHLD.shape[1]
    # Before 2.12 the kernel took heads that share a key without being told.
    options = {"enable_gqa": grouped} if "enable_gqa" in _TAKES else {}
    out_THD: Tensor = varlen_attn(
        *map(_flat, (query_BHLD, key_BKLD, value_BKLD)), segments.starts_S, segments.starts_S, segments.longest,
        segments.longest, scale=scaling, window_size=(-1 if window is None else window - 1, 0), **options,
    )  # fmt: skip
    return _by_row(out_THD, query_BHLD)


def _by_row(x_THD: Tensor, query_BHLD: Tensor) -> Tensor:
    """(B, L, H, D)."""
    found: Tensor = x_THD.unflatten(0, (query_BHLD.shape[0], -1))
    return found


def _flat(x_BHLD: Tensor) -> Tensor:
    """(B·L, heads, D)."""
    return x_BHLD.transpose(1, 2).flatten(0, 1)


# -- FlexAttention -----------------------------------------------------------------------------------------------------


def _no_flex(case: Case) -> str | None:
    if case.device.type != "cuda":
        return "is for CUDA"  # it has no backward pass on a CPU
    if case.dropout:
        return "has no dropout"
    if case.head_dim < 16 or case.value_dim < 16:
        return f"has no heads of {case.head_dim} and {case.value_dim}"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    return None


def block_mask(segments: Segments, window: int | None) -> flex.BlockMask:
    """Which blocks of queries meet which blocks of keys, for all layers of a step that have this sliding window."""
    group_BL, branch_BL, position_BL = segments.layout_BL

    def sees(b: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        mine = (branch_BL[b, i] == branch_BL[b, j]) | (branch_BL[b, j] == 0)
        found = (i >= j) & (group_BL[b, i] == group_BL[b, j]) & mine
        return found if window is None else found & (position_BL[b, i] - position_BL[b, j] < window)

    (rows, length), device = group_BL.shape, group_BL.device
    made = _compiled(flex.create_block_mask) if device.type == "cuda" else flex.create_block_mask
    found: flex.BlockMask = made(sees, rows, None, length, length, device=str(device))
    return found


def _flex(
    segments: Segments, scaling: float, dropout: float, window: int | None, query_BHLD: Tensor, key_BKLD: Tensor,
    value_BKLD: Tensor,
) -> Tensor:  # fmt: skip
    if window not in segments.block_masks:
        segments.block_masks[window] = block_mask(segments, window)
    apart = torch.compiler.is_compiling() or query_BHLD.device.type == "cpu"
    attention: Callable[..., Any] = flex.flex_attention
    function = attention if apart else _compiled(attention)
    out_BHLD: Tensor = function(
        query_BHLD, key_BKLD, value_BKLD, block_mask=segments.block_masks[window], scale=scaling,
        enable_gqa=key_BKLD.shape[1] != query_BHLD.shape[1],
        # Its kernel for few queries wants a power of two of heads to a key head.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )  # fmt: skip
    return out_BHLD.transpose(1, 2)


@lru_cache(maxsize=2)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Once for all layers; from the second length of a row on for all lengths."""
    made: Callable[..., Any] = torch.compile(function)
    return made


# -- segments of like length side by side ------------------------------------------------------------------------------


def _buckets(
    segments: Segments, scaling: float, dropout: float, window: int | None, query_BHLD: Tensor, key_BKLD: Tensor,
    value_BKLD: Tensor,
) -> Tensor:  # fmt: skip
    rows, _, length, _ = query_BHLD.shape
    if segments.rows:
        out_BHLD = attend(query_BHLD, key_BKLD, value_BKLD, scaling, dropout=dropout, window=window)
        return out_BHLD.transpose(1, 2).contiguous()
    flat = map(_flat, (query_BHLD, key_BKLD, value_BKLD))
    laid = zip(*(_Lay.apply(t, segments) for t in flat), strict=True)
    done = []
    for bucket, (q, k, v) in zip(segments.buckets, laid, strict=True):  # each (N, L', heads, D)
        out_NHLD = attend(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scaling, mask_NLL=bucket.sees(window),
            dropout=dropout, window=window if bucket.branch_NL is None else None,
        )  # fmt: skip
        done.append(out_NHLD.transpose(1, 2))
    out_BLHD: Tensor = _GatherRows.apply(segments, *done).unflatten(0, (rows, length))
    return out_BLHD


class _Lay(torch.autograd.Function):
    """(B·L, heads, D) → for each bucket (N, L', heads, D). Each position stands in one place: backward is a gather."""

    @staticmethod
    def forward(ctx: AutogradContext, flat: Tensor, segments: Segments) -> tuple[Tensor, ...]:
        ctx.segments = segments
        return tuple(_laid(flat, b, zeros=False) for b in segments.buckets)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor, None]:
        return _gathered(grads, ctx.segments), None


class _GatherRows(torch.autograd.Function):
    """The way back; what pads a segment on its right gets no gradient, and so gives none to the keys before it."""

    @staticmethod
    def forward(ctx: AutogradContext, segments: Segments, *laid: Tensor) -> Tensor:
        ctx.segments = segments
        return _gathered(laid, segments)

    @staticmethod
    def backward(ctx: AutogradContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(_laid(grad, b, zeros=True) for b in ctx.segments.buckets)


def _laid(flat: Tensor, bucket: Bucket, *, zeros: bool) -> Tensor:
    out = flat.index_select(0, bucket.index_NL.flatten())
    if zeros:
        out.index_fill_(0, bucket.pads_P, 0)
    found: Tensor = out.unflatten(0, bucket.index_NL.shape)
    return found


def _gathered(laid: Sequence[Tensor], segments: Segments) -> Tensor:
    assert segments.back_T is not None
    assert segments.pads_P is not None
    out = torch.cat([t.flatten(0, 1) for t in laid]).index_select(0, segments.back_T)
    return out.index_fill_(0, segments.pads_P, 0)


ATTENTIONS = {
    "flash": Attention("FlashAttention's varlen kernel", _no_flash, _flash),
    "varlen": Attention("torch's varlen kernel", _no_torch_varlen, _torch_varlen),
    "flex": Attention("FlexAttention, compiled", _no_flex, _flex),
    "buckets": Attention("segments of like length side by side", lambda case: None, _buckets),
}
"""By what a stage's `attention` calls them, the fastest first."""
