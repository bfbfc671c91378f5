"""Rows of tokens that are square maps: what connectors that look at neighbours need."""

from __future__ import annotations

from math import isqrt

from torch import Tensor

from opticnerve.types import Features, OpticNerveError


def grid_side(in_tokens: int, connector: str) -> int:
    """The side of the square map that `in_tokens` tokens make, row by row from the top left.

    Raises:
        OpticNerveError: the count is no square; the message has the squares on both sides of it.
    """
    side = isqrt(in_tokens)
    if side * side != in_tokens or not in_tokens:
        raise OpticNerveError(
            f"{connector} wants a square map of tokens, and the encoder gives {in_tokens} "
            f"({side}² is {side**2}, {side + 1}² is {(side + 1) ** 2}); leave out class tokens (class_token: drop), "
            "or take a connector that wants no map (linear, mlp, resampler)"
        )
    return side


def blanked(features: Features) -> Tensor:
    """The tokens (B, N, D) with zeros in place of those that are not real, so that neighbours see nothing of them.

    Behind the calibration zero is the mean: a missing token counts as an average one.
    """
    return features.tokens_BND.masked_fill(~features.mask_BN.unsqueeze(-1), 0)
