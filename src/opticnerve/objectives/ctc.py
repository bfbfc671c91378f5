"""Reading print without a language model: the characters of each boxed word, by connectionist temporal classification
(Graves et al. 2006), from the vision encoder's map. A stage of it before the others teaches an encoder letters at many
times the speed at which the language model's loss does.

Where on the map a word stands is known (its box), in which of the map's cells each letter is need not be. Words are cut
out as detectors of text do it (Liu et al. 2018, FOTS, section 3.2), and read as a CRNN reads a line (Shi et al. 2015,
section 2.3).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opticnerve.data.collators.base import SampleBatch
from opticnerve.data.media.transform import open_for
from opticnerve.objectives.base import Objective
from opticnerve.types import Conversation, DataError, MediaProcessor, OpticNerveError

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from opticnerve.recipe import Stage

CLASSES = 991
"""A character's class is its code point modulo this prime: no list of characters is needed. Letters, digits, kana and
full-width forms have each its own; kanji share some, and what follows with a language model tells them apart."""
_LISTED = re.compile(r"(.+?)\s*\[(\d+),\s*(\d+),\s*(\d+),\s*(\d+)\]")  # as boxes of style "plain" are written
_LEAST = 3.0  # thousandths: a box that is thinner has nothing to read
_HEIGHTS = (0.25, 0.5, 0.75)  # where a word is looked at, of its box's height
_TOGETHER = 16  # words


@dataclass
class WordBatch(SampleBatch):
    """Pictures and the words on them.

    `pixel_values`, `image_sizes`: as the processor gives them (sizes where pictures keep their shape, else None).
    `boxes_W4`: left, top, right, bottom of each word, as shares of its picture's sides; `of_W`: its picture's number.
    `classes_C`, `lengths_W`: the classes of all words' characters behind one another, and how many each word has.
    """

    pixel_values: Tensor
    image_sizes: Tensor | None
    boxes_W4: Tensor
    of_W: list[int]
    classes_C: Tensor
    lengths_W: list[int]
    ids: list[str]

    @property
    def supervised(self) -> int:
        """Characters: what the loss is a mean over."""
        return sum(self.lengths_W)

    tokens = supervised


class WordCollator:
    """Conversations of one picture whose answer lists words with their boxes, a line each → `WordBatch`."""

    def __init__(self, image_processor: BaseImageProcessor) -> None:
        self.image_processor = image_processor

    def __call__(self, rows: Sequence[Sequence[Conversation]]) -> WordBatch:
        """Raises: DataError: not one picture, no word with a box, or a picture that cannot be opened."""
        samples = [conversation for row in rows for conversation in row]
        listed = [words_of(sample) for sample in samples]
        pictures = [open_for(self.image_processor, s.images[0].source, where=s.where or s.id) for s in samples]
        seen = self.image_processor(pictures, return_tensors="pt")
        words = [(n, word, box) for n, some in enumerate(listed) for word, box in some]
        return WordBatch(
            pixel_values=seen["pixel_values"],
            image_sizes=seen.get("image_sizes"),
            boxes_W4=torch.tensor([box for *_, box in words]) / 1000,
            of_W=[n for n, *_ in words],
            classes_C=torch.tensor([ord(c) % CLASSES + 1 for _, word, _ in words for c in word]),
            lengths_W=[len(word) for _, word, _ in words],
            ids=[s.id or s.where for s in samples],
        )


def words_of(sample: Conversation) -> list[tuple[str, tuple[float, ...]]]:
    """The words of the last answer and their boxes in thousandths; spaces within a word are left out.

    Raises:
        DataError: there is not exactly one picture, or no line names a word and its box.
    """
    where = sample.where or sample.id
    if len(sample.images) != 1:
        raise DataError(f"ctc reads one picture a sample, not {len(sample.images)}", where=where, kind="no-image")
    found: list[tuple[str, tuple[float, ...]]] = []
    for line in (sample.answer or "").splitlines():
        if (listed := _LISTED.fullmatch(line.strip())) is None:
            continue
        left, top, right, bottom = (float(n) for n in listed.groups()[1:])
        word = "".join(listed[1].split())
        if word and min(right - left, bottom - top) >= _LEAST:
            found.append((word, (left, top, right, bottom)))
    if not found:
        raise DataError(
            "no line of its answer is a word and its box", where=where, kind="box",
            remedy='give objects with labels and an answer of "<objects>" (boxes: {style: plain, frame: thousandths})',
        )  # fmt: skip
    return found


class CTC(Objective):
    """The characters of boxed words, read off the image encoder's map; the language model does not run.

    Args:
        model: a docked model whose image encoder gives a map: `fit: native` or `squash`.
        width: of the reader that stands on the map while this objective trains, and is thrown away afterwards.
        steps: how many times a cell of the map is looked at from left to right: a character takes at least one, and the
            same one twice takes three. For cells of 16 pixels 8 are 2 pixels each.
        rate: the reader's learning rate.

    Sources: see the module. The map is magnified by sub-pixel convolution (Shi et al. 2016, section 3.1).
    """

    def __init__(self, model: Any, *, width: int = 96, steps: int = 8, rate: float = 2e-3) -> None:
        super().__init__(model)
        tower: Any = getattr(model, "image", None)
        encoder = getattr(tower, "encoder", None)
        if encoder is None or encoder.fit not in ("native", "squash") or tower.tiling is not None:
            raise OpticNerveError(
                "ctc wants an image encoder that shows whole pictures as one map: fit: native, or squash without "
                "tiling",
                kind="conflict",
            )
        self.width, self.steps, self.rate = width, steps, rate
        self.magnify = nn.Linear(encoder.hidden_size, 2 * steps * width)
        self.mix = nn.Linear(len(_HEIGHTS) * width, 2 * width)
        self.classify = nn.Linear(2 * width, CLASSES + 1)

    @classmethod
    def collator(cls, processor: MediaProcessor, stage: Stage, seed: int) -> WordCollator:
        """What makes batches of pictures and their words."""
        return WordCollator(processor.image_processor)

    def forward(self, batch: WordBatch) -> tuple[Tensor, Tensor]:
        """The float32 loss sum over the batch's words, and the number of their characters."""
        losses, chars = [], batch.classes_C.split(batch.lengths_W)
        for map_DHW, words in zip(self.maps(batch), self._alike(batch), strict=True):
            for some in words:
                logits_WTK, times = self.read(map_DHW, batch.boxes_W4[some])
                log_p_TWK = logits_WTK.log_softmax(-1).transpose(0, 1)
                wanted, lengths = torch.cat([chars[w] for w in some]), torch.tensor([batch.lengths_W[w] for w in some])
                losses.append(F.ctc_loss(log_p_TWK, wanted, times, lengths, zero_infinity=True, reduction="sum"))
        return torch.stack(losses).sum(), batch.classes_C.new_full((), batch.supervised)

    @staticmethod
    def _alike(batch: WordBatch) -> list[list[list[int]]]:
        """Each picture's words, a few of about the same width together: little of a row is filled up."""
        widths = (batch.boxes_W4[:, 2] - batch.boxes_W4[:, 0]).tolist()
        found: list[list[list[int]]] = []
        for number in range(batch.samples):
            mine = sorted((w for w, of in enumerate(batch.of_W) if of == number), key=widths.__getitem__)
            found.append([mine[n : n + _TOGETHER] for n in range(0, len(mine), _TOGETHER)])
        return found

    def maps(self, batch: WordBatch) -> list[Tensor]:
        """Each picture's map, magnified: (width, 2 · rows, steps · columns)."""
        features = self.model.image.encode(batch.pixel_values, batch.image_sizes)
        count = features.tokens_BND.shape[1]
        side = round(count**0.5)
        grids = features.grids or [(side, side)] * len(features.tokens_BND)
        out = []
        for tokens_ND, (rows, columns) in zip(features.tokens_BND, grids, strict=True):
            cells_ND = tokens_ND[: rows * columns].to(self.magnify.weight.dtype)
            # By channel: what differs between a picture's cells is little beside what they share.
            spread_D, mean_D = torch.std_mean(cells_ND, dim=0, keepdim=True)
            fine_NE = self.magnify((cells_ND - mean_D) / (spread_D + 1e-5))
            cells = fine_NE.view(rows, columns, 2, self.steps, self.width)
            out.append(cells.permute(4, 0, 2, 1, 3).reshape(self.width, 2 * rows, self.steps * columns))
        return out

    def read(self, map_DHW: Tensor, boxes_W4: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of each class (W, T, classes) at each time of words in boxes (shares), and how many times each has:
        one a column of the magnified map, and one more on either side."""
        columns = map_DHW.shape[2]
        left_W, top_W, right_W, bottom_W = boxes_W4.unbind(1)
        times = [max(2, ceil(w * columns)) + 2 for w in (right_W - left_W).tolist()]
        points_WhT2 = boxes_W4.new_zeros(len(times), len(_HEIGHTS), max(times), 2)
        heights = boxes_W4.new_tensor(_HEIGHTS)
        for n, count in enumerate(times):
            along = torch.linspace(0, 1, count, device=boxes_W4.device, dtype=boxes_W4.dtype)
            points_WhT2[n, :, :count, 0] = (left_W[n] - 1 / columns).lerp(right_W[n] + 1 / columns, along)
            points_WhT2[n, :, :, 1] = top_W[n].lerp(bottom_W[n], heights)[:, None]
        flat = points_WhT2.flatten(0, 1)[None] * 2 - 1
        seen_DWhT = F.grid_sample(map_DHW[None], flat.to(map_DHW), align_corners=False)[0]
        seen_DWhT = seen_DWhT.unflatten(1, (len(times), -1))
        hidden_WTE = self.mix(F.gelu(seen_DWhT.permute(1, 3, 2, 0).flatten(2)))
        return self.classify(F.gelu(hidden_WTE)), torch.tensor(times)

    @torch.inference_mode()
    def transcribe(self, batch: WordBatch) -> list[list[int]]:
        """The classes that are read in each word, by picking the likeliest at each time (no search)."""
        found: dict[int, list[int]] = {}
        for map_DHW, words in zip(self.maps(batch), self._alike(batch), strict=True):
            for some in words:
                logits_WTK, times = self.read(map_DHW, batch.boxes_W4[some])
                for w, row, count in zip(some, logits_WTK.argmax(-1).tolist(), times.tolist(), strict=True):
                    found[w] = [c for c, before in zip(row[:count], [0, *row], strict=False) if c and c != before]
        return [found[w] for w in sorted(found)]
