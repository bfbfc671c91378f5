"""Fewer tokens by averaging: the simplest way to spend less of the language model's context."""

from __future__ import annotations

from math import isqrt

from torch import Tensor, nn

from opticnerve.connectors.base import Connector
from opticnerve.types import Features, OpticNerveError


class WindowPoolConnector(Connector):
    """The mean of each square of neighbouring tokens, times one matrix.

    Args:
        in_size, out_size, in_tokens, calibrate: see `Connector`.
        window: side of the square in tokens.
    """

    def __init__(self, *, in_size: int, out_size: int, in_tokens: int, window: int = 2, calibrate: bool = True) -> None:
        super().__init__(in_size=in_size, out_size=out_size, in_tokens=in_tokens, calibrate=calibrate)
        side = isqrt(in_tokens)
        if side**2 != in_tokens or window < 1 or side % window:
            raise OpticNerveError(f"{in_tokens} tokens are no square map of windows of {window} × {window}")
        self.side, self.window = side, window
        self.linear = nn.Linear(in_size, out_size)
        # Beside what Connector put there: the keywords that build this module again.
        self.options |= {"window": window}

    @property
    def num_tokens(self) -> int:
        return (self.side // self.window) ** 2

    def project(self, features: Features) -> Features:
        real_BN1 = features.mask_BN.unsqueeze(2)
        sum_BMD = self._windows(features.tokens_BND.masked_fill(~real_BN1, 0)).sum(2)
        count_BM1 = self._windows(real_BN1.to(sum_BMD.dtype)).sum(2)
        return Features(self.linear(sum_BMD / count_BM1.clamp_min(1)), count_BM1.squeeze(2) > 0)

    def _windows(self, row_BND: Tensor) -> Tensor:
        """(B, N, D) → (B, windows, tokens of a window, D)."""
        across, window = self.side // self.window, self.window
        map_BHWWWD = row_BND.unflatten(1, (across, window, across, window))
        return map_BHWWWD.transpose(2, 3).flatten(3, 4).flatten(1, 2)
