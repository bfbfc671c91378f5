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
    fewer tokens, nothing thrown away.

    Sources: InternVL 1.5 (Chen et al. 2024, How Far Are We to GPT-4V?, section 3.1), Idefics3 (Laurençon et al. 2024,
    Building and better understanding vision-language models) and SmolVLM (Marafioti et al. 2025, section 2.2).

    With depth 1 it is transformers' `Idefics3Connector` (SmolVLM's too); with depth 2, the shuffle of `InternVLModel`
    and its `InternVLMultiModalProjector`. A wide token is real if any token of its square is. Of pictures that keep
    their shape odd sides are filled up, at the right and at the bottom, with what the calibration takes for average.

    Args:
        in_size, out_size, in_tokens, calibrate: see `Connector`.
        scale: side of the square; `scale`² times fewer tokens come out. Idefics3 takes 2, the small SmolVLMs 4.
        depth: number of linear layers: 1 for one matrix without bias (Idefics3), 2 or more for a layer norm and a
            perceptron with biases (InternVL).
        activation: between the linear layers, a name from transformers' `ACT2FN`; at depth 1 there is none.
        maps: whether the maps that come in have a shape of their own each (the encoder says so).
    """

    any_shape = True

    def __init__(
        self, *, in_size: int, out_size: int, in_tokens: int, scale: int = 2, depth: int = 1, activation: str = "gelu",
        calibrate: bool = True, maps: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(in_size=in_size, out_size=out_size, in_tokens=in_tokens, calibrate=calibrate)
        side = 0 if maps else grid_side(in_tokens, "pixel_shuffle")
        if scale < 2:
            raise OpticNerveError(
                f"pixel_shuffle scale is at least 2, not {scale}; to keep all tokens use mlp or linear",
                kind="out-of-range",
            )
        if side % scale:
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
        self.scale, self.side, self.pool = scale, side, scale
        wide = in_size * scale**2
        layers = (
            [nn.Linear(wide, out_size, bias=False)] if depth == 1 else [nn.LayerNorm(wide), nn.Linear(wide, out_size)]
        )
        for _ in range(depth - 1):
            layers += [ACT2FN[activation], nn.Linear(out_size, out_size)]
        self.layers = nn.Sequential(*layers)
        self.options |= {"scale": scale, "depth": depth, "activation": activation}

    @property
    def num_tokens(self) -> int:
        return self.in_tokens // self.scale**2 if self.side else self.in_tokens

    def project(self, features: Features) -> Features:
        if features.grids is not None:
            return self._of_shapes(features, features.grids)
        squares_BMSD = self._squares(blanked(features))
        mask_BM = self._squares(features.mask_BN.unsqueeze(-1)).any(-1).any(-1)
        return Features(self.layers(squares_BMSD.flatten(2)), mask_BM)

    def _of_shapes(self, features: Features, grids: Sequence[tuple[int, int]]) -> Features:
        tables = [_squares_of(*grid, self.scale) for grid in grids]
        nothing, longest = features.tokens_BND.shape[1], max(map(len, tables))
        index_BMS = np.full((len(tables), longest, self.scale**2), nothing)
        for row_MS, table_MS in zip(index_BMS, tables, strict=True):
            row_MS[: len(table_MS)] = np.where(table_MS < 0, nothing, table_MS)
        host_BMS = torch.from_numpy(index_BMS)
        index = sent(host_BMS, features.tokens_BND.device)
        rows_B11 = torch.arange(len(tables), device=index.device)[:, None, None]
        squares_BMSD = F.pad(blanked(features), (0, 0, 0, 1))[rows_B11, index]
        mask_BM = known((index < nothing).any(-1), (host_BMS < nothing).any(-1))
        shapes = tuple((-(-rows // self.scale), -(-columns // self.scale)) for rows, columns in grids)
        return Features(self.layers(squares_BMSD.flatten(2)), mask_BM, shapes)

    def _squares(self, row_BND: Tensor) -> Tensor:
        """(B, N, D) → (B, N / scale², scale², D): squares row by row, and within each its tokens row by row."""
        count, scale = self.side // self.scale, self.scale
        map_BHSWSD = row_BND.reshape(row_BND.shape[0], count, scale, count, scale, row_BND.shape[2])
        return map_BHSWSD.transpose(2, 3).reshape(row_BND.shape[0], self.num_tokens, scale**2, row_BND.shape[2])


@lru_cache(maxsize=1024)
def _squares_of(rows: int, columns: int, scale: int) -> np.ndarray[Any, Any]:
    """Which tokens of a map lie in each square: (squares, scale²), row by row, -1 beyond the map."""
    map_HW = np.arange(rows * columns).reshape(rows, columns)
    map_HW = np.pad(map_HW, ((0, -rows % scale), (0, -columns % scale)), constant_values=-1)
    cut_YsXs = map_HW.reshape(-(-rows // scale), scale, -1, scale)
    return cut_YsXs.transpose(0, 2, 1, 3).reshape(-1, scale**2)
