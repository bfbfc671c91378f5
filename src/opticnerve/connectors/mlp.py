"""A small perceptron on each token: LLaVA-1.5's connector (Liu et al. 2024, Improved Baselines, section 3.2)."""

from __future__ import annotations

from torch import nn
from transformers.activations import ACT2FN

from opticnerve.connectors.base import Connector
from opticnerve.types import Features, OpticNerveError


class MLPConnector(Connector):
    """`depth` linear layers with an activation between them, the hidden width being the language model's.

    With depth 2 and "gelu" it is transformers' `LlavaMultiModalProjector`, weight for weight.

    Args:
        in_size, out_size, in_tokens, calibrate: see `Connector`.
        depth: number of linear layers, at least 2 (for one, use `linear`).
        activation: a name from transformers' `ACT2FN`.
        bias: add bias vectors.
    """

    def __init__(
        self,
        *,
        in_size: int,
        out_size: int,
        in_tokens: int,
        depth: int = 2,
        activation: str = "gelu",
        bias: bool = True,
        calibrate: bool = True,
    ) -> None:
        super().__init__(in_size=in_size, out_size=out_size, in_tokens=in_tokens, calibrate=calibrate)
        if depth < 2:
            raise OpticNerveError(f"mlp depth is at least 2, not {depth}; for one layer use connector type: linear")
        if activation not in ACT2FN:
            raise OpticNerveError(f"unknown activation {activation!r}; known: {', '.join(sorted(ACT2FN))}")
        widths = [in_size] + [out_size] * depth
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += ([ACT2FN[activation]] if i else []) + [nn.Linear(a, b, bias=bias)]
        self.layers = nn.Sequential(*layers)
        self.options |= {"depth": depth, "activation": activation, "bias": bias}

    def project(self, features: Features) -> Features:
        return Features(self.layers(features.tokens_BND), features.mask_BN)
