"""Pairs of answers to the same question about the same picture, side by side in one row.

The picture and the question stand once, the chosen and the rejected answer behind them as two branches that do not see
each other (`data.encode.packing`): what both answers have in common is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from opticnerve.data.collators.base import open_once
from opticnerve.data.collators.next_token import Batch, Collator
from opticnerve.data.encode.packing import Row, fit, pack
from opticnerve.data.encode.tokenize import IGNORE, Encoded, encode
from opticnerve.types import ChatProcessor, Conversation, DataError, Message, TextPart

CHOSEN, REJECTED = 1, 2
"""Branches of a pair."""


@dataclass
class PreferenceBatch(Batch):
    """P pairs. `slots_BL`: int64, 2 × pair for the positions that predict its chosen answer, one more for those that
    predict its rejected one, -1 elsewhere. `sources`: (P,), the pairs' data entries."""

    slots_BL: Tensor

    @property
    def loss_sources(self) -> Tensor | None:
        return self.sources

    @property
    def supervised(self) -> int:
        """Pairs: what the loss is a mean over."""
        return self.samples


class PreferenceCollator(Collator):
    """Conversations that end with the chosen answer and carry the other one in `meta["rejected"]` → `PreferenceBatch`.

    Args:
        max_length: longest picture, question and answer, in tokens.
    """

    def __init__(self, processor: ChatProcessor, *, max_length: int | None = None) -> None:
        super().__init__(processor)
        self.max_length = max_length
        self._opened: set[Path] = set()

    def check(self, conversation: Conversation) -> None:
        """Raise a `DataError` for what `__call__` would raise one; each picture file is opened once at most."""
        pack([self.pair(conversation)])
        open_once(conversation, self.processor.image_processor, self._opened)

    def pair(self, conversation: Conversation) -> list[Encoded]:
        """The chosen and the rejected answer with all that stands before; of the labels only those of the answer."""
        rejected = conversation.meta.get("rejected")
        if not isinstance(rejected, str):
            raise DataError(
                "there is no rejected answer", where=conversation.where or conversation.id,
                remedy="give data in the preference format: image, question, chosen, rejected", kind="no-rejected",
            )  # fmt: skip
        other = Message("assistant", (TextPart(rejected),))
        both = conversation, replace(conversation, messages=(*conversation.messages[:-1], other))
        return [_last_turn(encode(c, self.processor, max_length=self.max_length)) for c in both]

    def __call__(self, rows: Sequence[Sequence[Conversation]]) -> PreferenceBatch:  # type: ignore[override]
        """`rows`: the conversations of each sample."""
        apart = [pack([self.pair(c)]) for row in rows for c in row]
        laid = fit(apart, max(map(len, apart)))  # short pairs side by side, in no more positions than apart
        made = super().__call__(laid)
        return PreferenceBatch(
            **{**vars(made), "samples": len(apart), "ids": [i for r in laid for i in r.ids[::2]]}, slots_BL=_slots(laid)
        )


def _last_turn(sample: Encoded) -> Encoded:
    """Nothing but the last answer is labelled."""
    end = max(i for i, label in enumerate(sample.labels) if label != IGNORE)
    start = end
    while start and sample.labels[start - 1] != IGNORE:
        start -= 1
    return replace(sample, labels=[IGNORE] * start + sample.labels[start:])


def _slots(rows: Sequence[Row]) -> Tensor:
    slots_BL = torch.full((len(rows), max(map(len, rows))), -1)
    pairs = 0
    for number, row in enumerate(rows):
        for i, (group, branch, target) in enumerate(zip(row.group, row.branch, row.targets, strict=True)):
            if target != IGNORE:
                assert branch in (CHOSEN, REJECTED), f"position {i} predicts an answer and belongs to branch {branch}"
                slots_BL[number, i] = 2 * (pairs + group) + (branch == REJECTED)
        pairs += max(row.group) + 1
    return slots_BL
