"""How much one visitor may ask of the page."""

from __future__ import annotations

from dataclasses import dataclass

from opticnerve.data.media.images import MAX_PIXELS
from opticnerve.types import OpticNerveError


@dataclass(frozen=True)
class Limits:
    """`upload_bytes`: of a picture's file. `pixels`: of a picture, by its header. `waiting`: questions in the queue.
    `question_characters`: of one question. `answer_tokens`: of the longest answer. `models`: kept in memory."""

    upload_bytes: int = 20_000_000
    pixels: int = min(64_000_000, MAX_PIXELS)
    waiting: int = 16
    question_characters: int = 4_000
    answer_tokens: int = 512
    models: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise OpticNerveError(f"{name.replace('_', '-')} must be 1 or more, not {value}")
