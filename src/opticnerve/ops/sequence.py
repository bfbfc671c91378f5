"""One sequence over several processes: each computes its share of the positions, and in attention, where positions
meet, its share of the heads (Jacobs et al. 2023, DeepSpeed Ulysses, section 3).

All that is not attention looks at one position alone. Before attention the processes exchange, so that each holds all
positions of some heads; after it they exchange back. Packs, branches and sliding windows are what they are on one
process, for `ops.varlen` does the attention in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from opticnerve.types import AutogradContext


@dataclass(frozen=True)
class SequenceGroup:
    """The processes that share a sequence. `group`: torch's; `size` of it, and this one's `rank` in it."""

    group: Any
    size: int
    rank: int

    def share(self, x_BL: Tensor, pad: float = 0) -> Tensor:
        """This process's positions of (B, L, …): the rank-th part of L, which is padded to parts of one length."""
        missing = -x_BL.shape[1] % self.size
        x_BL = F.pad(x_BL, [0, 0] * (x_BL.ndim - 2) + [0, missing], value=pad)
        return x_BL.chunk(self.size, dim=1)[self.rank]

    def attend(
        self, attention: Callable[[Tensor, Tensor, Tensor], Tensor], length: int, query_BHLD: Tensor,
        key_BKLD: Tensor, value_BKLD: Tensor,
    ) -> Tensor:  # fmt: skip
        """(B, L, H, D) of this process's positions, from its positions of all heads.

        Args:
            attention: of all `length` positions of some heads, (B, H, L, D) and twice (B, K, L, D) to (B, L, H, D).
        """
        heads = query_BHLD.shape[1]
        if key_BKLD.shape[1] % self.size:  # fewer than processes, or not to be dealt out: each query head its own
            key_BKLD, value_BKLD = (
                t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key_BKLD, value_BKLD)
            )  # fmt: skip
        whole = (self._to_heads(t)[:, :, :length] for t in (query_BHLD, key_BKLD, value_BKLD))
        out_BLHD = attention(*whole)
        missing = -length % self.size
        return self._to_positions(F.pad(out_BLHD, [0, 0, 0, 0, 0, missing]))

    def _to_heads(self, x_BHLD: Tensor) -> Tensor:
        """All heads of this process's positions → all positions of its heads."""
        given = x_BHLD.unflatten(1, (self.size, -1)).movedim(1, 0)  # to whom, B, heads, L, D
        found: Tensor = _Exchange.apply(given, self.group)  # from whom, B, heads, L, D
        return found.movedim(0, 2).flatten(2, 3)

    def _to_positions(self, x_BLHD: Tensor) -> Tensor:
        """All positions of this process's heads → all heads of its positions."""
        given = x_BLHD.unflatten(1, (self.size, -1)).movedim(1, 0)  # to whom, B, L, heads, D
        found: Tensor = _Exchange.apply(given, self.group)
        return found.movedim(0, 2).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """Part i of the first dimension goes to process i, whose part comes instead: its own way back."""

    @staticmethod
    def forward(ctx: AutogradContext, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _exchanged(parts, group)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grads[0], ctx.group), None


def _exchanged(parts: Tensor, group: Any) -> Tensor:
    given = parts.contiguous()
    found = torch.empty_like(given)
    dist.all_to_all_single(found, given, group=group)
    return found
