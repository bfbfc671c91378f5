"""One matrix: the first LLaVA's connector (Liu et al. 2023, Visual Instruction Tuning, section 4.1)."""

from __future__ import annotations

from torch import nn

from opticnerve.connectors.base import Connector
from opticnerve.types import Features


class LinearConnector(Connector):
    """Each visual token times one matrix.

    Args: in_size, out_size, in_tokens, calibrate: see `Connector`. bias: add a bias vector.
    """

    def __init__(
        self, *, in_size: int, out_size: int, in_tokens: int, bias: bool = True, calibrate: bool = True
    ) -> None:
        super().__init__(in_size=in_size, out_size=out_size, in_tokens=in_tokens, calibrate=calibrate)
        self.linear = nn.Linear(in_size, out_size, bias=bias)
        self.options |= {"bias": bias}

    def project(self, features: Features) -> Features:
        return Features(self.linear(features.tokens_BND), features.mask_BN)
