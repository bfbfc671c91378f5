"""Convolutions over the map of tokens, and pooling to fewer: a connector that keeps what stands beside what.

Source: the C-Abstractor of Honeybee (Cha et al. 2024, Locality-enhanced Projector for Multimodal LLM, section 3.2).
The blocks are timm's RegNet bottlenecks, as in the authors' code.
"""

from __future__ import annotations

from math import isqrt

import torch
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import nn
from torch.nn import functional as F

from opticnerve.connectors.base import Connector, blanked, check_counts, grid_side
from opticnerve.types import Features, OpticNerveError


class AbstractorConnector(Connector):
    """Honeybee's C-Abstractor: ResNet blocks, adaptive average pooling, as many blocks again, a perceptron.

    A block is a bottleneck with squeeze-and-excitation (1 × 1, 3 × 3 within each channel, 1 × 1), layer norms and SiLU.
    Masked tokens enter as zeros; a soft token is real if any token of its pooling window is.

    Args:
        in_size, out_size, in_tokens, calibrate: see `Connector`.
        out_tokens: soft tokens that come out, a square number; by default half the map's side, so that 24 × 24 become
            Honeybee's 144.
        depth: ResNet blocks before the pooling, and again behind it.
        hidden_size: channels of the blocks; the encoder's width by default (CLIP-L's 1,024 are Honeybee's 1,024).
        mlp_depth: number of linear layers of the read-out.
    """

    def __init__(
        self, *, in_size: int, out_size: int, in_tokens: int, out_tokens: int | None = None, depth: int = 3,
        hidden_size: int | None = None, mlp_depth: int = 2, calibrate: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(in_size=in_size, out_size=out_size, in_tokens=in_tokens, calibrate=calibrate)
        hidden = in_size if hidden_size is None else hidden_size
        check_counts("abstractor", depth=depth, hidden_size=hidden, mlp_depth=mlp_depth)
        self.side = grid_side(in_tokens, "abstractor")
        self.out_side = _out_side(self.side, out_tokens)
        self.pos_emb = nn.Parameter(torch.empty(1, in_tokens, in_size))
        nn.init.trunc_normal_(self.pos_emb, std=0.02)
        self.net = nn.Sequential(
            _blocks(depth, in_size, hidden), nn.AdaptiveAvgPool2d(self.out_side), _blocks(depth, hidden, hidden)
        )
        layers: list[nn.Module] = [nn.Linear(hidden, out_size)]
        for _ in range(mlp_depth - 1):
            layers += [nn.SiLU(), nn.Linear(out_size, out_size)]
        self.readout = nn.Sequential(*layers)
        self.options |= {
            "out_tokens": out_tokens, "depth": depth, "hidden_size": hidden_size, "mlp_depth": mlp_depth
        }  # fmt: skip

    @property
    def num_tokens(self) -> int:
        return self.out_side**2

    def project(self, features: Features) -> Features:
        tokens_BND = blanked(features) + self.pos_emb
        map_BDHW = tokens_BND.transpose(1, 2).unflatten(2, (self.side, self.side))
        pooled_BDHW = self.net(map_BDHW)
        mask_B1HW = features.mask_BN.to(features.tokens_BND.dtype).unflatten(1, (1, self.side, self.side))
        pooled_BM = F.adaptive_max_pool2d(mask_B1HW, self.out_side).flatten(1) > 0
        return Features(self.readout(pooled_BDHW.flatten(2).transpose(1, 2)), pooled_BM)


def _blocks(depth: int, in_size: int, out_size: int) -> nn.Module:
    return RegStage(depth, in_size, out_size, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)


def _out_side(side: int, out_tokens: int | None) -> int:
    """The side of the pooled map."""
    if out_tokens is None:
        return max(side // 2, 1)
    out_side = isqrt(max(out_tokens, 0))
    if out_side**2 != out_tokens or not 0 < out_side <= side:
        raise OpticNerveError(
            f"abstractor out_tokens is a square number from 1 to {side**2} (the encoder's tokens), not {out_tokens}",
            kind="out-of-range",
        )
    return out_side
