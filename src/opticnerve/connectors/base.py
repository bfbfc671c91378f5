"""What every connector promises: features at the encoder's width in, soft tokens at the language model's width out.

The base class also holds the *calibration*: buffers that standardise what comes in and scale what goes out, measured
once on the first pictures of training. With them a fresh connector starts inside the language model's embedding cloud
and learns at once; without them (`calibrate=False`, or before calibration) they change nothing, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from opticnerve.types import Features, OpticNerveError


class Connector(nn.Module, ABC):
    """The nerve between an encoder and a language model.

    Args:
        in_size: width of the encoder's tokens. out_size: width of the language model's embeddings.
        in_tokens: how many tokens the encoder gives for one image; the most, where they differ.
        calibrate: whether training may measure and set the calibration buffers.

    A subclass implements `project` and, where it changes the number of tokens, `num_tokens`; `options` holds the plain
    keywords that build the same module again (without the sizes, which come from the neighbours).
    `keeps_grid`: the tokens that come out are a map in raster order if those that go in are (queries that gather from
    everywhere are none). `by_area`: they are none, but as many as the map has rectangles of `pool`. `any_shape`: it
    takes pictures that keep their shape, too: where it asks what stands beside what, `features.grids` tells. `pool`:
    rows and columns of tokens that become one. `wants_text`: `project` also takes the question's token ids and their
    mask.
    """

    any_shape: bool = False
    pool: tuple[int, int] = (1, 1)
    keeps_grid: bool = True
    by_area: bool = False
    wants_text: bool = False

    input_mean: Tensor
    input_std: Tensor
    output_scale: Tensor
    calibrated: Tensor

    if TYPE_CHECKING:
        # What a subclass has of its own is a module, a tensor or a plain value.
        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, *, in_size: int, out_size: int, in_tokens: int, calibrate: bool = True) -> None:
        super().__init__()
        self.in_size, self.out_size, self.in_tokens, self.calibrate_allowed = in_size, out_size, in_tokens, calibrate
        self.register_buffer("input_mean", torch.zeros(in_size))
        self.register_buffer("input_std", torch.ones(in_size))
        self.register_buffer("output_scale", torch.ones(()))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))
        self.options: dict[str, Any] = {"calibrate": calibrate}

    def start(self, embeddings: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Called once on a fresh connector with what it is docked onto; most take nothing from it."""

    def reset_calibration(self) -> None:
        """As before `calibrate`. (By `nn.init`, which transformers keeps away from what a file has filled.)"""
        for table in (self.input_mean, self.calibrated):
            nn.init.zeros_(table)
        for table in (self.input_std, self.output_scale):
            nn.init.ones_(table)

    @property
    def num_tokens(self) -> int:
        """Soft tokens that come out for one image."""
        return self.in_tokens

    @abstractmethod
    def project(self, features: Features) -> Features:
        """(B, in_tokens, in_size) → (B, num_tokens, out_size). Where `wants_text`, also ids and mask (B, T)."""

    def forward(self, features: Features, *text: Tensor) -> Features:
        if features.tokens_BND.shape[-1] != self.in_size:
            raise ValueError(
                f"the connector takes width {self.in_size}, the encoder gave {features.tokens_BND.shape[-1]}"
            )
        out = self.project(self.standardise(features), *text)
        return replace(out, tokens_BND=out.tokens_BND * self.output_scale) if self.calibrate_allowed else out

    def standardise(self, features: Features) -> Features:
        """What `project` is handed: the encoder's tokens through the calibration."""
        if not self.calibrate_allowed:
            return features
        return replace(features, tokens_BND=(features.tokens_BND - self.input_mean) / self.input_std)

    @torch.no_grad()
    def calibrate(self, features: Features, embedding_std: float, *text: Tensor) -> None:
        """Measure: each input channel to mean 0 and deviation 1; the output to `embedding_std`.

        `features`: what the encoder gives for a few dozen pictures. Called once, before the first step of the first
        stage that trains this connector; afterwards the numbers are weights like any other and travel with it.
        """
        if not self.calibrate_allowed or bool(self.calibrated):
            return
        seen_MD = features.tokens_BND[features.mask_BN].float()
        std_D = seen_MD.std(0)
        # A channel that never moves carries nothing: dividing by its deviation would blow up its noise.
        floor = 1e-3 * std_D.mean().clamp_min(1e-6)
        self.input_mean.copy_(seen_MD.mean(0))
        self.input_std.copy_(std_D.clamp_min(floor))
        out = self.forward(features, *text)
        self.output_scale.copy_(embedding_std / out.tokens_BND[out.mask_BN].float().std().clamp_min(1e-6))
        self.calibrated.fill_(True)


def check_activation(name: str) -> None:
    if name not in ACT2FN:
        raise OpticNerveError(f"unknown activation {name!r}; known: {', '.join(sorted(ACT2FN))}", kind="unknown-name")


def check_counts(connector: str, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise OpticNerveError(f"{connector} {name} is at least 1, not {value}", kind="out-of-range")


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
            "or take a connector that wants no map (linear, mlp, resampler)",
            kind="wrong-shape",
        )
    return side


def blanked(features: Features) -> Tensor:
    """The tokens (B, N, D) with zeros in place of those that are not real, so that neighbours see nothing of them.

    Behind the calibration zero is the mean: a missing token counts as an average one.
    """
    return features.tokens_BND.masked_fill(~features.mask_BN.unsqueeze(-1), 0)
