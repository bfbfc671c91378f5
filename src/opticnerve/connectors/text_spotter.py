"""Print as soft tokens: one for each character on a page, in reading order.

A language model copies from what resembles text. So the map is read first: where a character stands is the peak of a
heat map (Zhou et al. 2019, Objects as Points, section 3), which one it is a classification at that place (Xing et al.
2019, Convolutional Character Networks, section 3.2); the soft token is the mean of an embedding over the classes (as
AlignVLM's connector: Masry et al. 2025, section 3). `objectives.text_spotting` teaches it to read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from opticnerve.connectors.base import Connector, blanked, check_counts, grid_side
from opticnerve.connectors.reading_order import reading_order
from opticnerve.encoders.native import real
from opticnerve.types import Features, OpticNerveError

CLASSES = 991
"""A character's class is its code point modulo this prime: no list of characters is needed. Letters, digits, kana and
full-width forms have each its own; kanji share some, and the language model tells them apart."""
SUBCELLS = (4, 8)
"""Rows and columns that each of the map's cells is magnified to: of 16 pixels, 4 × 2 pixels each."""
_AROUND = (5, 9)  # of these, what a character's class is read from
_RATES = 16


@dataclass(frozen=True)
class Spotted:
    """What a picture's map says of print. `heat_YX`: float32, the logit that a character's middle is in each subcell;
    `fine_DYX`: the magnified map; `cells_RCE`: the map itself, standardised by channel."""

    heat_YX: Tensor
    fine_DYX: Tensor
    cells_RCE: Tensor


class TextSpotterConnector(Connector):
    """Each character on a page as a soft token, in reading order, with where it stands.

    As many tokens come out as the picture's area asks for, so that a prompt can be laid out before it is seen: the
    surest characters, or behind all characters tokens that say "nothing". Gradients reach the map through which
    characters they are; where characters stand, `text_spotting` alone teaches.

    Args:
        in_size, out_size, in_tokens, calibrate: see `Connector`. By default nothing is measured: what comes in is
            standardised picture by picture, and what goes out is made of the language model's own embeddings.
        width: of the magnified map. hidden: of the perceptron that names characters.
        threshold: how sure a peak must be, as a probability, to count as a character.
        pool: rows and columns of the map's cells for which there is one token: of 16 pixels each, two hold a character
            of the smallest print that is read well.
        maps: whether the maps that come in have a shape of their own each (the encoder says so).
    """

    any_shape = True
    keeps_grid = False
    by_area = True

    def __init__(
        self, *, in_size: int, out_size: int, in_tokens: int, width: int = 32, hidden: int = 256,
        threshold: float = 0.3, pool: Sequence[int] = (1, 2), calibrate: bool = False, maps: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(in_size=in_size, out_size=out_size, in_tokens=in_tokens, calibrate=calibrate)
        self.side = 0 if maps else grid_side(in_tokens, "text_spotter")
        if len(pool) != 2 or not 0 < threshold < 1:
            raise OpticNerveError(
                f"text_spotter: pool is [rows, columns], not {pool!r}, and threshold between 0 and 1, not {threshold}",
                kind="out-of-range",
            )
        check_counts("text_spotter", width=width, hidden=hidden, rows=pool[0], columns=pool[1])
        self.width, self.threshold, self.pool = width, threshold, (int(pool[0]), int(pool[1]))
        self.magnify = nn.Linear(in_size, SUBCELLS[0] * SUBCELLS[1] * width)
        self.mix = nn.Conv2d(width, width, (3, 5), padding=(1, 2))
        self.middle = nn.Conv2d(width, 1, 3, padding=1)
        assert self.middle.bias is not None
        nn.init.constant_(self.middle.bias, math.log(0.01))  # of a hundred subcells one
        self.gather = nn.Linear(_AROUND[0] * _AROUND[1] * width + in_size, hidden)
        self.classify = nn.Linear(hidden, CLASSES)
        self.characters = nn.Embedding(CLASSES, out_size)
        nn.init.normal_(self.characters.weight, std=0.02)
        self.places = nn.Linear(4 * _RATES + 2, out_size, bias=False)
        nn.init.zeros_(self.places.weight)
        self.nothing = nn.Parameter(torch.zeros(out_size))
        self.options |= {"width": width, "hidden": hidden, "threshold": threshold, "pool": list(self.pool)}

    @property
    def num_tokens(self) -> int:
        return self.tokens_for(self.side, self.side) if self.side else self.in_tokens

    def tokens_for(self, rows: int, columns: int) -> int:
        """Soft tokens of a map of so many cells."""
        return -(-rows // self.pool[0]) * -(-columns // self.pool[1])

    @torch.no_grad()
    def start(self, embeddings: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """A character's embedding is at first the language model's own: the mean over the tokens that spell it."""
        table_VD = getattr(embeddings, "weight", None)
        if table_VD is None or table_VD.is_meta or not table_VD.is_floating_point():
            return
        characters = _usual()
        spelled = tokenizer(characters, add_special_tokens=False)["input_ids"]
        for character, ids in zip(characters, spelled, strict=True):
            mean_D = table_VD[torch.tensor(ids, device=table_VD.device)].float().mean(0)
            self.characters.weight[ord(character) % CLASSES] = mean_D.to(self.characters.weight)

    def project(self, features: Features) -> Features:
        rows = [self._soft(cells_NE, grid) for cells_NE, grid in self.maps(features)]
        tokens_BMD = pad_sequence(rows, batch_first=True)
        return Features(tokens_BMD, real([len(row) for row in rows], tokens_BMD))

    def maps(self, features: Features) -> list[tuple[Tensor, tuple[int, int]]]:
        """Each picture's map, cell by cell, and its rows and columns."""
        grids = features.grids or ((self.side, self.side),) * len(features.tokens_BND)
        return [(row_NE[: g[0] * g[1]], g) for row_NE, g in zip(blanked(features), grids, strict=True)]

    def spot(self, cells_NE: Tensor, grid: tuple[int, int]) -> Spotted:
        """Where there is print on a picture's map of `grid` rows and columns."""
        spread_E, mean_E = torch.std_mean(cells_NE, dim=0, keepdim=True)
        cells_NE = (cells_NE - mean_E) / (spread_E + 1e-5)
        fine_RCvhD = self.magnify(cells_NE).view(*grid, *SUBCELLS, self.width)
        fine_DYX = F.gelu(fine_RCvhD.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2))
        fine_DYX = fine_DYX + self.mix(fine_DYX[None])[0]
        heat_YX = self.middle(F.gelu(fine_DYX)[None])[0, 0].float()
        return Spotted(heat_YX, fine_DYX, cells_NE.view(*grid, -1))

    def name(self, spotted: Spotted, y_N: Tensor, x_N: Tensor) -> Tensor:
        """(N, classes): scores of each class at subcells of a picture."""
        (high, wide), device = _AROUND, y_N.device
        padded_DYX = F.pad(spotted.fine_DYX, (wide // 2, wide // 2, high // 2, high // 2))
        y_Nh1 = (y_N[:, None] + torch.arange(high, device=device))[:, :, None]
        x_N1w = (x_N[:, None] + torch.arange(wide, device=device))[:, None, :]
        around_NE = padded_DYX[:, y_Nh1, x_N1w].transpose(0, 1).flatten(1)
        cell_NE = spotted.cells_RCE[y_N // SUBCELLS[0], x_N // SUBCELLS[1]]
        scores_NK: Tensor = self.classify(F.gelu(self.gather(torch.cat([around_NE, cell_NE], dim=1))))
        return scores_NK

    @torch.no_grad()
    def peaks(self, spotted: Spotted, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows and columns (subcells) of the surest `count` places, and the logits that characters stand there; -inf
        where there are no more peaks."""
        heat_YX = spotted.heat_YX
        # In 16 bits neighbours may be equal: the one before wins.
        ramp_YX = torch.linspace(0, 1e-3, heat_YX.numel(), device=heat_YX.device).view_as(heat_YX)
        heat_YX = heat_YX - ramp_YX
        highest_YX = F.max_pool2d(heat_YX[None], 3, stride=1, padding=1)[0]
        peaks_P = heat_YX.masked_fill(heat_YX < highest_YX, -torch.inf).flatten()
        logit_N, index_N = peaks_P.topk(min(count, len(peaks_P)))
        return index_N // heat_YX.shape[1], index_N % heat_YX.shape[1], logit_N

    def is_character(self, logit_N: Tensor) -> Tensor:
        """Whether peaks are sure enough."""
        return logit_N > math.log(self.threshold / (1 - self.threshold))

    def _soft(self, cells_NE: Tensor, grid: tuple[int, int]) -> Tensor:
        """A picture's soft tokens: (tokens, out_size)."""
        spotted = self.spot(cells_NE, grid)
        y_N, x_N, logit_N = self.peaks(spotted, self.tokens_for(*grid))
        real_N = self.is_character(logit_N)
        across_N, down_N = ((n + 0.5) / s for n, s in zip((x_N, y_N), SUBCELLS[::-1], strict=True))
        read = reading_order(across_N, down_N, real_N, (float(grid[1]), float(grid[0])))
        order_N, weight = read.order_N, self.places.weight
        share_NK = self.name(spotted, y_N[order_N], x_N[order_N]).float().softmax(-1)
        places_NE = _places(across_N[order_N], read.y_N, read.line_N)
        tokens_ND = share_NK.to(weight) @ self.characters.weight + self.places(places_NE.to(weight))
        return torch.where(real_N[order_N, None], tokens_ND, self.nothing)


def _places(x_N: Tensor, y_N: Tensor, line_N: Tensor) -> Tensor:
    """(N, 4 · rates + 2): sines and cosines of where each character stands, of periods from 2π cells to 300 times that;
    whether it is its line's first; and what the way from the one before is beyond a letter's width."""
    rates = 300.0 ** -(torch.arange(_RATES, device=x_N.device) / (_RATES - 1))
    angles_N2R = torch.stack([x_N, y_N], dim=1)[..., None] * rates
    waves_NE = torch.cat([angles_N2R.sin(), angles_N2R.cos()], dim=-1).flatten(1)
    first_N = torch.diff(line_N, prepend=line_N[:1] - 1) != 0
    way_N = torch.diff(x_N, prepend=x_N[:1]).clamp(0, 4).masked_fill(first_N, 0)
    return torch.cat([waves_NE, first_N[:, None], way_N[:, None]], dim=1)


def _usual() -> list[str]:
    """Letters, digits and signs of western and Japanese print, rarer ones first: those behind take a class over."""
    kanji = [bytes((row, cell)).decode("euc_jp", "ignore") for row in range(0xB0, 0xD0) for cell in range(0xA1, 0xFF)]
    ranges = [(0x3001, 0x301D), (0x3041, 0x3097), (0x30A1, 0x30FD), (0xFF01, 0xFF5F), (0xA1, 0x100), (0x20AC, 0x20AD)]
    others = [chr(code) for first, end in [*ranges, (0x21, 0x7F)] for code in range(first, end)]
    return [character for character in [*kanji, *others] if character]
