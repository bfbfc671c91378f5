"""In which order print is read: places of characters on a page that may lie askew, or be bent, put into lines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_REACHES = ((1.8, 0.35, 0.15), (6.0, 0.0, 0.3), (12.0, 0.0, 0.3))
"""Of each round: which pairs are taken for neighbours in a line: so far apart along it, and so far across it, as a
share of that and beside it."""
_STIFFNESS = (1e-4, 1e-2, 1e-2, 1e-2, 1e-2)  # against bends that few pairs ask for
_NEXT_LINE = 0.3


@dataclass(frozen=True)
class ReadingOrder:
    """`order_N`: the places as they are read, those that hold nothing last. `line_N`: the number of each one's line, in
    that order, from the top; `y_N`: where it stands once the page is laid flat."""

    order_N: Tensor
    line_N: Tensor
    y_N: Tensor


@torch.no_grad()
def reading_order(x_N: Tensor, y_N: Tensor, real_N: Tensor, extent: tuple[float, float]) -> ReadingOrder:
    """Lines from top to bottom, and each from left to right.

    The page is laid flat first: how far each place is pushed down is a polynomial in x and y whose differences between
    neighbours in a line are fitted (least squares in a few rounds, each with neighbours farther apart). So a line may
    rise or fall by more than its distance from the next.

    Args:
        x_N, y_N: float, middles of characters. Lines are about a unit apart, or more.
        real_N: bool, whether there is a character.
        extent: width and height of the page, in the same unit.
    """
    flat_N = y_N
    both_NN = real_N[:, None] & real_N
    dx_NN = x_N - x_N[:, None]
    bends_NK = _bends(x_N, y_N, *extent)
    dbends_NNK = bends_NK - bends_NK[:, None]
    stiffness_KK = torch.diag(x_N.new_tensor(_STIFFNESS))
    for reach, share, beside in _REACHES:
        across_NN = (flat_N - flat_N[:, None]).abs()
        near_NN = both_NN & (dx_NN > 0.1) & (dx_NN < reach) & (across_NN < share * dx_NN + beside)
        weighted_NNK = dbends_NNK * near_NN[..., None]
        count = near_NN.sum().clamp_min(1)
        normal_KK = torch.einsum("ijk,ijl->kl", weighted_NNK, dbends_NNK) / count
        wanted_K = torch.einsum("ijk,ij->k", weighted_NNK, y_N - y_N[:, None]) / count
        flat_N = y_N - bends_NK @ torch.linalg.solve(normal_KK + stiffness_KK, wanted_K)
    nowhere = torch.full_like(flat_N, torch.inf)
    sorted_N, down_N = torch.where(real_N, flat_N, nowhere).sort(stable=True)
    gaps_N = torch.diff(sorted_N, prepend=sorted_N[:1])
    new_line_N = (gaps_N > _NEXT_LINE) | sorted_N.isinf()
    line_N = new_line_N.cumsum(0)
    along_N = (line_N * (2 * extent[0] + 1) + x_N[down_N]).argsort(stable=True)
    order_N = down_N[along_N]
    return ReadingOrder(order_N, line_N[along_N], flat_N[order_N])


def _bends(x_N: Tensor, y_N: Tensor, width: float, height: float) -> Tensor:
    """(N, 5): a slope, one that changes down the page, and one that changes along it, as pushes down at each place."""
    u, v = 2 * x_N / width - 1, 2 * y_N / height - 1
    return torch.stack([u, u * v, u**2, u**2 * v, u**3], dim=1) * (width / 2)
