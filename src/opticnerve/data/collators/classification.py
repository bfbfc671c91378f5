"""Questions about one picture each, with answers from a closed set, as a batch for a `FusionClassifier`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opticnerve.common.on_host import on_host
from opticnerve.data.collators.base import SampleBatch, SampleCollator, open_once
from opticnerve.types import Conversation, DataError, Features, OpticNerveError


@dataclass
class AnswerBatch(SampleBatch):
    """B questions.

    `input_ids`, `attention_mask`: (B, L). `pixel_values`: (B, 3, H, W), or None where `image_features`, what a frozen
    vision encoder saw, stand in for it. `targets`: (B,), places in the closed set.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor | None
    targets: Tensor
    ids: list[str]
    image_features: Features | None = None
    sources: Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(on_host(self.attention_mask).sum())


class AnswerCollator(SampleCollator):
    """Conversations of one picture, one question and its answer → `AnswerBatch`.

    Args:
        processor: a `FusionClassifierProcessor`.
    """

    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        self._opened: set[Path] = set()

    def check(self, conversation: Conversation) -> None:
        """Raise a `DataError` for what `__call__` would raise one; each picture file is opened once at most."""
        self._target(conversation)
        question_of(conversation)
        open_once(conversation, self.processor.image_processor, self._opened)

    def __call__(self, rows: Sequence[Sequence[Conversation]]) -> AnswerBatch:
        """`rows`: the conversations of each sample; all of them are asked.

        Raises:
            DataError: a conversation without exactly one picture and one question, an answer outside the closed set, or
                a picture that cannot be opened.
        """
        conversations = [c for row in rows for c in row]
        targets = torch.tensor([self._target(c) for c in conversations])
        batch, cached = self.inputs(conversations, [question_of(c) for c in conversations])
        return AnswerBatch(
            batch["input_ids"], batch["attention_mask"], batch.get("pixel_values"), targets,
            [c.id for c in conversations], cached,
        )  # fmt: skip

    def _target(self, conversation: Conversation) -> int:
        where = conversation.where or conversation.id
        if conversation.answer is None:
            raise DataError("this question has no answer to learn", where=where, kind="no-answer")
        try:
            return int(self.processor.place_of(conversation.answer))
        except OpticNerveError as e:
            remedy = "name it in model.answers, or leave such samples out"
            raise DataError(str(e), where=where, remedy=remedy, kind="answer") from e


def question_of(conversation: Conversation) -> str:
    """The words of the only question, where there is exactly one picture.

    Raises:
        DataError: otherwise.
    """
    asked = [m for m in conversation.prompt().messages if m.role == "user"]
    words = asked[-1].text.strip() if asked else ""
    if len(conversation.images) != 1 or len(asked) != 1 or not words:
        raise DataError(
            f"a fusion classifier takes one picture and one question; this sample has {len(conversation.images)} "
            f"pictures and {sum(bool(m.text.strip()) for m in asked)} questions",
            where=conversation.where or conversation.id, kind="no-question",
            remedy="give questions one by one, not dialogues",
        )  # fmt: skip
    return words


def normal(answer: str) -> str:
    """An answer as it is compared: lower case, single spaces."""
    return " ".join(answer.lower().split())


def answer_set(conversations: Iterable[Conversation], *, most: int = 10_000) -> list[str]:
    """Every answer that occurs, once, sorted: a closed set. (Upper and lower case are one answer.)

    Raises:
        OpticNerveError: fewer than two of them, or more than `most`.
    """
    found = sorted({normal(c.answer) for c in conversations if c.answer} - {""})
    if len(found) < 2:
        only = f"{found[0]!r} is the only answer" if found else "there are no answers"
        raise OpticNerveError(f"{only} in the data; a classifier wants at least two", kind="empty")
    if len(found) > most:
        raise OpticNerveError(
            f"the data hold {len(found):,} different answers, which is no closed set (at most {most:,}); "
            f"train a docked language model, or name the answers in model.answers",
            kind="too-large",
        )
    return found
