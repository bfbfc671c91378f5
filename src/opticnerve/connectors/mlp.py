"""Connectors that treat each token by itself: a matrix, a perceptron, and either behind a shuffle of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from opticnerve.common.on_host import known, sent
from opticnerve.connectors.base import Connector, blanked, check_activation, check_counts, grid_side
from opticnerve.types import Features, OpticNerveError

_WAVES = 16  # of each axis, in the positions


class LinearConnector(Connector):
    """Each visual token times one matrix: the first LLaVA's connector (Liu et al. 2023, Visual Instruction Tuning,
    section 4.1).

    Args: in_size, out_size, in_tokens, calibrate: see `Connector`. bias: add a bias vector.
    """

    any_shape = True

    def __init__(
        self, *, in_size: int, out_size: int, in_tokens: int, bias: bool = True, calibrate: bool = True
    ) -> None:
        super().__init__(in_size=in_size, out_size=out_size, in_tokens=in_tokens, calibrate=calibrate)
        self.linear = nn.Linear(in_size, out_size, bias=bias)
        self.options |= {"bias": bias}

    def project(self, features: Features) -> Features:
        return replace(features, tokens_BND=self.linear(features.tokens_BND))


class MLPConnector(Connector):
    """`depth` linear layers with an activation between them, the hidden width being the language model's: LLaVA-1.5's
    connector (Liu et al. 2024, Improved Baselines, section 3.2).

    With depth 2 and "gelu" it is transformers' `LlavaMultiModalProjector`, weight for weight.

    Args:
        in_size, out_size, in_tokens, calibrate: see `Connector`.
        depth: number of linear layers, at least 2 (for one, use `linear`).
        activation: a name from transformers' `ACT2FN`.
        bias: add bias vectors.
    """

    any_shape = True

    def __init__(
        self, *, in_size: int, out_size: int, in_tokens: int, depth: int = 2, activation: str = "gelu",
        bias: bool = True, calibrate: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(in_size=in_size, out_size=out_size, in_tokens=in_tokens, calibrate=calibrate)
        if depth < 2:
            raise OpticNerveError(
                f"mlp depth is at least 2, not {depth}; for one layer use connector type: linear", kind="out-of-range"
            )
        check_activation(activation)
        widths = [in_size] + [out_size] * depth
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += ([ACT2FN[activation]] if i else []) + [nn.Linear(a, b, bias=bias)]
        self.layers = nn.Sequential(*layers)
        self.options |= {"depth": depth, "activation": activation, "bias": bias}

    def project(self, features: Features) -> Features:
        return replace(features, tokens_BND=self.layers(features.tokens_BND))


class PixelShuffleConnector(Connector):
    """Each square of `scale` × `scale` tokens, laid side by side as one, times one matrix or through a perceptron:
    fewer tokens, nothing thrown away. Or each rectangle: lines of print are wide and low.

    Sources: InternVL 1.5 (Chen et al. 2024, How Far Are We to GPT-4V?, section 3.1), Idefics3 (Laurençon et al. 2024,
    Building and better understanding vision-language models) and SmolVLM (Marafioti et al. 2025, section 2.2).

    With depth 1 it is transformers' `Idefics3Connector` (SmolVLM's too); with depth 2, the shuffle of `InternVLModel`
    and its `InternVLMultiModalProjector`. A wide token is real if any token of its square is. Of pictures that keep
    their shape odd sides are filled up, at the right and at the bottom, with what the calibration takes for average.

    Args:
        in_size, out_size, in_tokens, calibrate: see `Connector`.
        scale: side of the square; `scale`² times fewer tokens come out. Idefics3 takes 2, the small SmolVLMs 4. Where
            pictures keep their shape also [rows, columns].
        depth: number of linear layers: 1 for one matrix without bias (Idefics3), 2 or more for a layer norm and a
            perceptron with biases (InternVL).
        activation: between the linear layers, a name from transformers' `ACT2FN`; at depth 1 there is none.
        positions: add to each token what row and column it stands in, as a learned matrix of sines and cosines
            (Dosovitskiy et al. 2021, appendix D.4, of both axes): a language model counts along one line only. Where
            pictures keep their shape.
        maps: whether the maps that come in have a shape of their own each (the encoder says so).
    """

    any_shape = True

    def __init__(
        self, *, in_size: int, out_size: int, in_tokens: int, scale: int | Sequence[int] = 2, depth: int = 1,
        activation: str = "gelu", positions: bool = False, calibrate: bool = True, maps: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(in_size=in_size, out_size=out_size, in_tokens=in_tokens, calibrate=calibrate)
        side = 0 if maps else grid_side(in_tokens, "pixel_shuffle")
        pool = _pair(scale)
        if min(pool) < 1 or max(pool) < 2:
            raise OpticNerveError(
                f"pixel_shuffle scale is at least 2, not {scale}; to keep all tokens use mlp or linear",
                kind="out-of-range",
            )
        if side and pool[0] != pool[1]:
            raise OpticNerveError(
                f"pixel_shuffle scale {list(pool)} leaves no square map; give one number, or the encoder fit: native",
                kind="wrong-shape",
            )
        if side % pool[0]:
            fitting = ", ".join(str(s) for s in range(2, side + 1) if side % s == 0)
            raise OpticNerveError(
                f"pixel_shuffle scale {scale} does not divide the side of the encoder's map, {side} ({in_tokens} "
                f"tokens); scales that do: {fitting or 'none'}; or give the encoder another image_size",
                kind="wrong-shape",
            )
        check_counts("pixel_shuffle", depth=depth)
        check_activation(activation)
        if depth == 1 and activation != "gelu":
            raise OpticNerveError(
                f"activation {activation!r} does nothing at depth 1; set depth: 2, or leave it out", kind="conflict"
            )
        self.pool, self.side = pool, side
        wide = in_size * pool[0] * pool[1]
        layers = (
            [nn.Linear(wide, out_size, bias=False)] if depth == 1 else [nn.LayerNorm(wide), nn.Linear(wide, out_size)]
        )
        for _ in range(depth - 1):
            layers += [ACT2FN[activation], nn.Linear(out_size, out_size)]
        self.layers = nn.Sequential(*layers)
        if positions and not maps:
            raise OpticNerveError(
                "pixel_shuffle positions tell rows from columns where pictures keep their shape; give the encoder fit: "
                "native, or leave them out",
                kind="conflict",
            )
        self.positions = nn.Linear(4 * _WAVES, out_size, bias=False) if positions else None
        self.options |= {
            "positions": positions,
            "scale": scale if isinstance(scale, int) else list(scale),
            "depth": depth,
            "activation": activation,
        }

    @property
    def num_tokens(self) -> int:
        return self.in_tokens // (self.pool[0] * self.pool[1]) if self.side else self.in_tokens

    def project(self, features: Features) -> Features:
        if features.grids is not None:
            return self._of_shapes(features, features.grids)
        squares_BMSD = self._squares(blanked(features))
        mask_BM = self._squares(features.mask_BN.unsqueeze(-1)).any(-1).any(-1)
        return Features(self.layers(squares_BMSD.flatten(2)), mask_BM)

    def _of_shapes(self, features: Features, grids: Sequence[tuple[int, int]]) -> Features:
        (height, width), size = self.pool, self.pool[0] * self.pool[1]
        tables = [_squares_of(*grid, *self.pool) for grid in grids]
        nothing, longest = features.tokens_BND.shape[1], max(map(len, tables))
        index_BMS = np.full((len(tables), longest, size), nothing)
        for row_MS, table_MS in zip(index_BMS, tables, strict=True):
            row_MS[: len(table_MS)] = np.where(table_MS < 0, nothing, table_MS)
        host_BMS = torch.from_numpy(index_BMS)
        index = sent(host_BMS, features.tokens_BND.device)
        rows_B11 = torch.arange(len(tables), device=index.device)[:, None, None]
        squares_BMSD = F.pad(blanked(features), (0, 0, 0, 1))[rows_B11, index]
        mask_BM = known((index < nothing).any(-1), (host_BMS < nothing).any(-1))
        shapes = tuple((-(-rows // height), -(-columns // width)) for rows, columns in grids)
        tokens_BMD = self.layers(squares_BMSD.flatten(2))
        if self.positions is not None:
            waves_BME = np.zeros((len(tables), longest, 4 * _WAVES), dtype=np.float32)
            for row_ME, shape in zip(waves_BME, shapes, strict=True):
                row_ME[: shape[0] * shape[1]] = _waves_of(*shape)
            tokens_BMD = tokens_BMD + self.positions(
                sent(torch.from_numpy(waves_BME), tokens_BMD.device).to(tokens_BMD)
            )
        return Features(tokens_BMD, mask_BM, shapes)

    def _squares(self, row_BND: Tensor) -> Tensor:
        """(B, N, D) → (B, N / scale², scale², D): squares row by row, and within each its tokens row by row."""
        scale = self.pool[0]
        count = self.side // scale
        map_BHSWSD = row_BND.reshape(row_BND.shape[0], count, scale, count, scale, row_BND.shape[2])
        return map_BHSWSD.transpose(2, 3).reshape(row_BND.shape[0], self.num_tokens, scale**2, row_BND.shape[2])


@lru_cache(maxsize=1024)
def _squares_of(rows: int, columns: int, height: int, width: int) -> np.ndarray[Any, Any]:
    """Which tokens of a map lie in each rectangle: (rectangles, height · width), row by row, -1 beyond the map."""
    map_HW = np.arange(rows * columns).reshape(rows, columns)
    map_HW = np.pad(map_HW, ((0, -rows % height), (0, -columns % width)), constant_values=-1)
    cut_YhXw = map_HW.reshape(-(-rows // height), height, -1, width)
    return cut_YhXw.transpose(0, 2, 1, 3).reshape(-1, height * width)


@lru_cache(maxsize=256)
def _waves_of(rows: int, columns: int) -> np.ndarray[Any, Any]:
    """(rows · columns, 4 · waves): sines and cosines of each cell's row, then of its column, of periods from 2π cells
    to 300 times that."""
    rates = 300.0 ** -(np.arange(_WAVES) / (_WAVES - 1))
    y, x = (np.arange(n)[:, None] * rates for n in (rows, columns))
    down, along = (np.concatenate([np.sin(a), np.cos(a)], axis=1) for a in (y, x))
    return np.concatenate([down.repeat(columns, 0), np.tile(along, (rows, 1))], axis=1)


def _pair(scale: int | Sequence[int]) -> tuple[int, int]:
    sides = [scale, scale] if isinstance(scale, int) else list(scale)
    if len(sides) != 2 or not all(isinstance(n, int) for n in sides):
        raise OpticNerveError(
            f"pixel_shuffle scale is a whole number or two, [rows, columns], not {scale!r}", kind="wrong-type"
        )
    return sides[0], sides[1]
