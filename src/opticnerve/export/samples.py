"""The fixed prompts that an export is judged by: text alone, one picture, two, sound; short, long, over two turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from opticnerve.types import AudioPart, Conversation, ImagePart, Message, Part, TextPart

LONG = (
    "Look at the picture once more, slowly, from the upper left corner to the lower right one. Name what you see "
    "first, then what stands behind it, then its colours; count to 12 where something can be counted."
)
# Each turn: the user's words, how many pictures and sounds stand before them, and the answer (None: to be given).
TURNS: tuple[tuple[tuple[str, int, int, str | None], ...], ...] = (
    (("Name a colour.", 0, 0, None),),
    (("What is in the picture?", 1, 0, None),),
    ((LONG, 1, 0, None),),
    (("Compare the two pictures.", 2, 0, None),),
    (("Is it red?", 1, 0, "No, it is green."), ("And what shape has it? Answer in one word.", 0, 0, None)),
    (("What do you hear?", 0, 1, None),),
)
RATE = 16_000


@dataclass(frozen=True)
class ExportSample:
    """One conversation up to the answer, and the files of its pictures in order."""

    conversation: Conversation
    pictures: tuple[Path, ...]

    def messages(self) -> list[dict[str, Any]]:
        """In transformers' chat format, pictures by path."""
        shown = iter(self.pictures)

        def part(p: Part) -> dict[str, str]:
            if isinstance(p, TextPart):
                return {"type": "text", "text": p.text}
            return {"type": "image", "path": str(next(shown))}

        return [{"role": m.role, "content": [part(p) for p in m.parts]} for m in self.conversation.messages]


def make(folder: Path, *, picture_sizes: Sequence[tuple[int, int]], sees: bool, hears: bool) -> list[ExportSample]:
    """The samples that a model takes; their pictures are written into `folder`.

    Args:
        picture_sizes: widths and heights, taken in turn. sees, hears: whether the model has a vision encoder, an audio
            encoder.
    """
    made, count = [], 0
    for turns in TURNS:
        if any((pictures and not sees) or (sounds and not hears) for _, pictures, sounds, _ in turns):
            continue
        messages, files = [], []
        for words, pictures, sounds, answer in turns:
            parts: list[Part] = []
            for _ in range(pictures):
                file = folder / f"picture-{count}.png"
                picture(count, picture_sizes[count % len(picture_sizes)]).save(file)
                parts.append(ImagePart(file))
                files.append(file)
                count += 1
            parts += [AudioPart(tone())] * sounds
            messages.append(Message("user", (*parts, TextPart(words))))
            if answer is not None:
                messages.append(Message("assistant", (TextPart(answer),)))
        made.append(ExportSample(Conversation(tuple(messages)), tuple(files)))
    return made


def picture(seed: int, size: tuple[int, int]) -> PIL.Image.Image:
    """A slope of colours with a rectangle and some noise: neither flat nor all noise, and never twice the same."""
    width, height = size
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    mixed = np.stack([x, y, 1 - x], -1) @ rng.uniform(0, 200, (3, 3)) / 2
    left, top = rng.uniform(0.1, 0.5, 2)
    mixed[(x > left) & (x < left + 0.4) & (y > top) & (y < top + 0.3)] = rng.uniform(0, 255, 3)
    return PIL.Image.fromarray(np.clip(mixed + rng.normal(0, 12, mixed.shape), 0, 255).astype(np.uint8))


def tone() -> Any:
    """A second of two tones, mono, 16 kHz."""
    time = np.arange(RATE) / RATE
    return (0.3 * np.sin(2 * math.pi * 440 * time) + 0.1 * np.sin(2 * math.pi * 1000 * time)).astype(np.float32)
