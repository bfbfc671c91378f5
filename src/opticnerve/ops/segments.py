"""Where the segments of a batch lie, in numbers: made beside the batch, on the host, so that a step asks no device.

A packed row is a chain of segments that do not see each other; padding is one, too, which nobody looks at. A segment is
causal: what pads it on the right is seen by nobody before it. Samples with a common beginning are one segment of
several branches, each blind to the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opticnerve.ops.sequence import SequenceGroup

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

LIKE = 0.75
"""Segments lie together if the shortest has at least this share of the longest's positions."""


@dataclass(frozen=True)
class Bucket:
    """Segments of like length.

    `index_NL`: for each of N segments its places among the batch's B·L; what pads it repeats its last one. `pads_P`:
    where the padding stands among the N·L.
    `branch_NL`, `position_NL`: of segments with branches, which one each place belongs to, and how far from the
    beginning it is. `mask_NLL`: bool, whether i sees j, where causal order alone does not say it; see `masked`.
    """

    index_NL: Tensor
    pads_P: Tensor
    branch_NL: Tensor | None = None
    position_NL: Tensor | None = None
    mask_NLL: Tensor | None = None

    def masked(self) -> Bucket:
        """With `mask_NLL`, where there are branches: i sees what stands before it, in the common beginning or in its
        branch. Made where the numbers lie, and before the first layer, which may be compiled."""
        if self.branch_NL is None:
            return self
        length = self.branch_NL.shape[1]
        mine = (self.branch_NL[:, :, None] == self.branch_NL[:, None, :]) | (self.branch_NL[:, None, :] == 0)
        causal_LL = torch.ones(length, length, dtype=torch.bool, device=mine.device).tril()
        return replace(self, mask_NLL=mine & causal_LL)

    def sees(self, window: int | None) -> Tensor | None:
        """`mask_NLL` within a sliding window."""
        assert self.branch_NL is None or self.mask_NLL is not None, "branches see each other; see `masked`"
        if window is None or self.mask_NLL is None or self.position_NL is None:
            return self.mask_NLL
        return self.mask_NLL & (self.position_NL[:, :, None] - self.position_NL[:, None, :] < window)

    def to(self, device: torch.device | str) -> Bucket:
        moved = (t if t is None else t.to(device, non_blocking=True) for t in vars(self).values())
        return Bucket(*moved)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Segments:
    """The segments of a batch.

    `starts_S`: int32, where among the B·L positions each segment begins, and B·L at the end (FlashAttention's
    `cu_seqlens`), padding taken for segments of its own; `longest`: positions of the longest.
    `layout_BL`: what they were made of: group, branch and position of each of the B·L.
    `back_T`: for each of the B·L positions its place among those of all buckets, one after the other. `pads_P`: the
    positions that belong to no segment.
    `rows`: each row of the batch is one causal segment already, padded on the right: nothing is laid elsewhere.
    `spread`: the processes that share the L positions, and L; of what attention is given each holds its part.
    `kernel`: who computes (`packed_attention.ATTENTIONS`), once that is chosen; `block_masks`: by window, what
    FlexAttention wants to be told.
    """

    buckets: tuple[Bucket, ...]
    starts_S: Tensor
    longest: int
    layout_BL: tuple[Tensor, Tensor, Tensor]
    back_T: Tensor | None = None
    pads_P: Tensor | None = None
    rows: bool = False
    spread: tuple[SequenceGroup, int] | None = None
    kernel: str | None = None
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict)

    @property
    def branches(self) -> bool:
        """Whether order alone does not say who sees whom."""
        return any(b.branch_NL is not None for b in self.buckets)

    def masked(self) -> Segments:
        """With its buckets' masks."""
        return replace(self, buckets=tuple(b.masked() for b in self.buckets))

    def to(self, device: torch.device | str) -> Segments:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        group_BL, branch_BL, position_BL = map(moved, self.layout_BL)
        return replace(
            self,
            buckets=tuple(b.to(device) for b in self.buckets),
            starts_S=moved(self.starts_S),
            layout_BL=(group_BL, branch_BL, position_BL),
            back_T=None if self.back_T is None else moved(self.back_T),
            pads_P=None if self.pads_P is None else moved(self.pads_P),
        )


def segments_of(group_BL: Tensor, branch_BL: Tensor, positions_BL: Tensor) -> Segments:
    """The segments of rows as `data.encode.packing` makes them.

    Args:
        group_BL: which sample, or group of samples with a common beginning, each position belongs to; -1 for padding.
        branch_BL: within a group: 0 for what all its samples share, which each of them sees; 1, 2, … for each's own.
        positions_BL: within a sample; a branch's go on from what it shares.
    """
    length, layout_BL = group_BL.shape[1], (group_BL, branch_BL, positions_BL)
    starts, longest = [], 0
    found: list[tuple[int, int, bool]] = []  # where it starts among the B·L, how long it is, whether it has branches
    for row, (groups, branches) in enumerate(zip(group_BL, branch_BL, strict=True)):
        values, counts = torch.unique_consecutive(groups, return_counts=True)
        start = 0
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            starts.append(row * length + start)
            longest = max(longest, count)
            if value >= 0:
                found.append((starts[-1], count, bool(branches[start : start + count].any())))
            start += count
    starts_S = torch.tensor([*starts, group_BL.numel()], dtype=torch.int32)
    if len(found) == len(group_BL) and all(s % length == 0 and not b for s, _, b in found):
        return Segments((), starts_S, longest, layout_BL, rows=True)
    order = sorted(range(len(found)), key=lambda i: -found[i][1])
    buckets, back_T, filled = [], torch.zeros(group_BL.numel(), dtype=torch.long), 0
    while order:
        longest_here = found[order[0]][1]
        together = [i for i in order if found[i][1] >= LIKE * longest_here and found[i][2] == found[order[0]][2]]
        order = [i for i in order if i not in together]
        steps_L = torch.arange(longest_here)
        index_NL = torch.stack([found[i][0] + steps_L.clamp(max=found[i][1] - 1) for i in together])
        for n, i in enumerate(together):
            start, count, _ = found[i]
            back_T[start : start + count] = filled + n * longest_here + torch.arange(count)
        filled += index_NL.numel()
        lengths_N = torch.tensor([found[i][1] for i in together])
        pads_P = (steps_L >= lengths_N[:, None]).flatten().nonzero().flatten()
        own = [t_BL.flatten()[index_NL] if found[together[0]][2] else None for t_BL in (branch_BL, positions_BL)]
        buckets.append(Bucket(index_NL, pads_P, *own))
    pads_P = (group_BL.flatten() < 0).nonzero().flatten()
    return Segments(tuple(buckets), starts_S, longest, layout_BL, back_T, pads_P)
