"""Reading print without a language model: where each character stands, and which one it is. A stage of it before the
others teaches an encoder letters, and a `text_spotter` connector to read, at many times the speed at which the language
model's loss would.

The loss on middles is CenterNet's (Zhou et al. 2019, Objects as Points, section 3, after CornerNet's focal loss), that
on characters CharNet's (Xing et al. 2019, Convolutional Character Networks, section 3.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width

import torch
from torch import Tensor
from torch.nn import functional as F

from opticnerve.connectors.text_spotter import CLASSES, TextSpotterConnector
from opticnerve.data.collators.base import SampleBatch
from opticnerve.data.media.transform import open_for
from opticnerve.objectives.base import Objective
from opticnerve.types import Conversation, DataError, MediaProcessor, OpticNerveError

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from opticnerve.recipe import Stage

_LISTED = re.compile(r"(.+?)\s*\[(\d+),\s*(\d+),\s*(\d+),\s*(\d+)\]")  # as boxes of style "plain" are written
_LEAST = 1.0  # thousandths: a box that is thinner has nothing to read
_REACH, _SPREAD = 2, 1.3  # of the bump around a middle, in subcells


@dataclass
class CharacterBatch(SampleBatch):
    """Pictures and the characters on them.

    `pixel_values`, `image_sizes`: as the processor gives them (sizes where pictures keep their shape, else None).
    `middles_C2`: x and y of each character, as shares of its picture's sides; `classes_C`: which it is;
    `counts`: how many each picture has.
    """

    pixel_values: Tensor
    image_sizes: Tensor | None
    middles_C2: Tensor
    classes_C: Tensor
    counts: list[int]
    ids: list[str]

    @property
    def supervised(self) -> int:
        """Characters: what the loss is a mean over."""
        return sum(self.counts)

    tokens = supervised


class CharacterCollator:
    """Conversations of one picture whose answer lists words with their boxes, a line each → `CharacterBatch`."""

    def __init__(self, image_processor: BaseImageProcessor) -> None:
        self.image_processor = image_processor

    def __call__(self, rows: Sequence[Sequence[Conversation]]) -> CharacterBatch:
        """Raises: DataError: not one picture, no word with a box, or a picture that cannot be opened."""
        samples = [conversation for row in rows for conversation in row]
        listed = [characters_of(sample) for sample in samples]
        pictures = [open_for(self.image_processor, s.images[0].source, where=s.where or s.id) for s in samples]
        seen = self.image_processor(pictures, return_tensors="pt")
        characters = [one for some in listed for one in some]
        return CharacterBatch(
            pixel_values=seen["pixel_values"],
            image_sizes=seen.get("image_sizes"),
            middles_C2=torch.tensor([middle for _, middle in characters]) / 1000,
            classes_C=torch.tensor([ord(character) % CLASSES for character, _ in characters]),
            counts=[len(some) for some in listed],
            ids=[s.id or s.where for s in samples],
        )


def characters_of(sample: Conversation) -> list[tuple[str, tuple[float, float]]]:
    """The characters of the boxed words of the last answer, and their middles in thousandths; no spaces.

    A word's characters share its box from left to right, those that are printed wide (kana, kanji) twice as much as
    others. Where boxes hold one character each, their middles are exact.

    Raises:
        DataError: there is not exactly one picture, or no line names a word and its box.
    """
    where = sample.where or sample.id
    if len(sample.images) != 1:
        raise DataError(
            f"text_spotting reads one picture a sample, not {len(sample.images)}", where=where, kind="no-image"
        )
    found: list[tuple[str, tuple[float, float]]] = []
    for line in (sample.answer or "").splitlines():
        if (listed := _LISTED.fullmatch(line.strip())) is None:
            continue
        left, top, right, bottom = (float(n) for n in listed.groups()[1:])
        if min(right - left, bottom - top) >= _LEAST:
            found += [(c, (x, (top + bottom) / 2)) for c, x in _along(listed[1], left, right)]
    if not found:
        raise DataError(
            "no line of its answer is a word and its box", where=where, kind="box",
            remedy='give objects with labels and an answer of "<objects>" (boxes: {style: plain, frame: thousandths})',
        )  # fmt: skip
    return found


def _along(word: str, left: float, right: float) -> Iterator[tuple[str, float]]:
    """Each character of a word and its middle."""
    wide = [2 if east_asian_width(c) in "WF" else 1 for c in word]
    step, at = (right - left) / sum(wide), left
    for character, width in zip(word, wide, strict=True):
        if not character.isspace():
            yield character, at + step * width / 2
        at += step * width


class TextSpotting(Objective):
    """Where characters stand on a picture's map, and which they are; the language model does not run.

    Args:
        model: a docked model with a `text_spotter` connector, whose image encoder gives one map: `fit: native` or
            `squash`.

    Sources: see the module.
    """

    ddp_only = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        tower: Any = getattr(model, "image", None)
        if not isinstance(getattr(tower, "connector", None), TextSpotterConnector) or tower.tiling is not None:
            raise OpticNerveError(
                "text_spotting teaches an image connector of type text_spotter to read, without tiling", kind="conflict"
            )
        if (fit := tower.encoder.fit) not in ("native", "squash"):
            raise OpticNerveError(
                f"text_spotting wants whole pictures: fit: native, or squash, not {fit}", kind="conflict"
            )

    @classmethod
    def collator(cls, processor: MediaProcessor, stage: Stage, seed: int) -> CharacterCollator:
        """What makes batches of pictures and their characters."""
        return CharacterCollator(processor.image_processor)

    def forward(self, batch: CharacterBatch) -> tuple[Tensor, Tensor]:
        """The float32 loss sum over the batch's characters, and their number. `metrics`: the shares of it that are
        about middles and about classes, a character."""
        tower = self.model.image
        connector: TextSpotterConnector = tower.connector
        features = connector.standardise(tower.encode(batch.pixel_values, batch.image_sizes))
        middles, named = [], []
        marked = zip(batch.middles_C2.split(batch.counts), batch.classes_C.split(batch.counts), strict=True)
        for (cells_NE, grid), (middles_C2, classes_C) in zip(connector.maps(features), marked, strict=True):
            spotted = connector.spot(cells_NE.to(connector.magnify.weight.dtype), grid)
            bumps_YX, y_C, x_C = _bumps(middles_C2, spotted.heat_YX)
            middles.append(_focal(spotted.heat_YX, bumps_YX))
            named.append(F.cross_entropy(connector.name(spotted, y_C, x_C).float(), classes_C, reduction="sum"))
        sums = torch.stack([torch.stack(middles).sum(), torch.stack(named).sum()])
        self.metrics = dict(zip(("middles", "characters"), sums.detach() / batch.supervised, strict=True))
        return sums.sum(), batch.classes_C.new_full((), batch.supervised)


def _bumps(middles_C2: Tensor, heat_YX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each subcell how near it is to a character's middle (1: it holds one); and the subcell of each."""
    high, wide = heat_YX.shape
    x_C = (middles_C2[:, 0] * wide).long().clamp(0, wide - 1)
    y_C = (middles_C2[:, 1] * high).long().clamp(0, high - 1)
    steps_S = torch.arange(2 * _REACH + 1, device=heat_YX.device)
    near_SS = torch.exp(-((steps_S[:, None] - _REACH) ** 2 + (steps_S - _REACH) ** 2) / _SPREAD).to(heat_YX)
    beside = wide + 2 * _REACH
    index_SSC = (y_C + steps_S[:, None, None]) * beside + x_C + steps_S[:, None]
    padded_P = heat_YX.new_zeros((high + 2 * _REACH) * beside)
    near_P = near_SS[..., None].expand(index_SSC.shape).flatten()
    padded_P = padded_P.scatter_reduce(0, index_SSC.flatten(), near_P, "amax")
    bumps_YX = padded_P.view(high + 2 * _REACH, -1)[_REACH:-_REACH, _REACH:-_REACH]
    return bumps_YX, y_C, x_C


def _focal(heat_YX: Tensor, bumps_YX: Tensor) -> Tensor:
    """CenterNet's loss: a cross entropy that what is sure already adds little to, and what lies near a middle less."""
    p_YX = heat_YX.sigmoid()
    middle_YX = (1 - p_YX) ** 2 * F.logsigmoid(heat_YX)
    elsewhere_YX = (1 - bumps_YX) ** 4 * p_YX**2 * F.logsigmoid(-heat_YX)
    return -torch.where(bumps_YX == 1, middle_YX, elsewhere_YX).sum()
