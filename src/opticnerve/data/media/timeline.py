"""Frames of a video in time: how many of them, which, and what is said of each.

Of a video of S seconds, count = ⌊S · fps⌋ but at least 1 and at most `max`, and the frames are those on the screen at
i · S / count for i = 0 … count − 1. Where the rate does not vary these are the same that transformers takes for `fps`
(`video_utils.default_sample_indices_fn`), save that `max` spreads fewer over the whole, as Qwen2-VL's own preparation
does. What is written before a frame is when it is shown, as Qwen3-VL has it: `<2.5 seconds>`.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from opticnerve.types import OpticNerveError

MAX_COUNT = 1024  # frames that may be asked for


@dataclass(frozen=True, slots=True)
class FrameSampling:
    """Frames in time: `fps` of them a second, at equal distances, at most `max` of a video; `timestamps`: with words
    before each that say when it is shown; `pool`: side of the squares of a frame's soft tokens that become their mean
    (LLaVA-NeXT's `mm_spatial_pool_stride`)."""

    fps: float
    max: int = 32
    timestamps: bool = True
    pool: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.fps <= 1000 or not 0 < self.max <= MAX_COUNT:
            raise OpticNerveError(
                f"frames is {self.fps:g} a second and at most {self.max}; more than 0 to 1000 and 1 to {MAX_COUNT} "
                "can be asked for", kind="out-of-range",
            )  # fmt: skip

    def count(self, seconds: Fraction) -> int:
        """Frames of a video of that length."""
        return min(max(int(seconds * Fraction(str(self.fps))), 1), self.max)


def sampling_of(frames: int | dict[str, Any]) -> int | FrameSampling:
    """As a recipe or a processor says it: so many, or `{fps, max, timestamps, pool}`."""
    return frames if isinstance(frames, int) else FrameSampling(**frames)


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each frame is shown and when the last one ends, in units of `unit` seconds, ascending; `ticks` is empty of a
    video that does not say."""

    ticks: tuple[int, ...]
    end: int
    unit: Fraction

    @property
    def seconds(self) -> Fraction:
        return (self.end - self.ticks[0]) * self.unit

    def spaced(self, count: int) -> list[int]:
        """The numbers of the frames on the screen at `count` times at equal distances."""
        gaps = {b - a for a, b in pairwise((*self.ticks, self.end))}
        if max(gaps) - min(gaps) <= 1:  # a steady rate, its times rounded to units
            return [i * len(self.ticks) // count for i in range(count)]
        first, whole = self.ticks[0], self.end - self.ticks[0]
        return [bisect_right(self.ticks, first + Fraction(i * whole, count)) - 1 for i in range(count)]

    def timestamp(self, number: int) -> str:
        """What is written before a frame."""
        return f"<{float((self.ticks[number] - self.ticks[0]) * self.unit):.1f} seconds>"
