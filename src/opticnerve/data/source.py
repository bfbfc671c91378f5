"""From a recipe's data entries to conversations, the starter kit's names included, and to the units of an epoch."""

from __future__ import annotations

import hashlib
import importlib
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opticnerve.data.images import Frame
from opticnerve.data.readers import read
from opticnerve.recipe import DataSpec
from opticnerve.types import Conversation, DataError, OpticNerveError

OnError = Callable[[DataError], None]

# Names that stand for data of the starter kit: the module that prepares it, and the file among those that it makes.
STARTER = {
    "starter/easy-vqa/captions": ("easy_vqa", "captions"),
    "starter/easy-vqa/train-questions": ("easy_vqa", "questions"),
    "starter/easy-vqa/test-questions": ("easy_vqa", "test"),
    "starter/easy-vqa/conversations": ("easy_vqa", "conversations"),
    "starter/emoji/train": ("emoji", "train"),
    "starter/emoji/held-out-vendor": ("emoji", "vendor"),
    "starter/emoji/held-out-emoji": ("emoji", "emoji"),
    "starter/emoji/held-out-both": ("emoji", "both"),
    "starter/spoken-words/captions": ("spoken_words", "captions"),
    "starter/spoken-words/train": ("spoken_words", "questions"),
    "starter/spoken-words/held-out-voices": ("spoken_words", "held-out-voices"),
    "starter/spoken-words/held-out-words": ("spoken_words", "held-out-words"),
}


def load_data(spec: DataSpec, *, on_error: OnError | None = None) -> list[Conversation]:
    """All conversations of one data entry, in file order.

    Raises:
        DataError: a bad sample, unless `on_error` takes it.
        OpticNerveError: no such file or starter name.
    """
    path = os.path.expandvars(spec.path)
    media = os.path.expandvars(spec.media) if spec.media else None
    trusted = spec.allow_outside_media
    if path.startswith("starter/"):
        path, media = _starter(path)
        trusted = True
    found = read(
        path,
        format=spec.format,
        media=media,
        prompt=spec.prompt,
        limit=spec.limit,
        allow_outside_media=trusted,
        group_by_image=spec.group_by_image,
        frames=spec.frames,
        on_error=on_error,
    )
    return [c for c in found if spec.split == "all" or held_out(c) == (spec.split == "held_out")]


def held_out(conversation: Conversation) -> bool:
    """Whether a sample belongs to the held-out twentieth.

    The hash of its first picture's (or sound's) file name (or bytes) decides, so that all that is said of one picture
    stays on one side, in every data file and on every machine.
    """
    for part in conversation.pieces:
        source = part.source.source if isinstance(part.source, Frame) else part.source
        if isinstance(source, Path | bytes):
            key = source.name.encode() if isinstance(source, Path) else source
            return hashlib.sha256(key).digest()[0] % 20 == 0
    return False


def load_units(
    specs: Sequence[DataSpec], *, on_error: OnError | None = None
) -> list[tuple[list[Conversation], int | None]]:
    """Units of training: one conversation, or, with `share_prefix`, all questions about one picture and how many of
    them to draw at a time."""
    units: list[tuple[list[Conversation], int | None]] = []
    for spec in specs:
        conversations = load_data(spec, on_error=on_error)
        if not conversations:
            raise OpticNerveError(f"{spec.path} holds no usable sample")
        made: list[tuple[list[Conversation], int | None]]
        if spec.share_prefix:
            made = [(group, spec.per_image) for group in by_picture(conversations)]
        else:
            made = [([c], None) for c in conversations]
        units += made * spec.repeat
    return units


def by_picture(conversations: Sequence[Conversation]) -> list[list[Conversation]]:
    """Conversations about the same pictures, together; in order of first appearance."""
    groups: dict[Any, list[Conversation]] = {}
    for conversation in conversations:
        key = tuple(
            p.source if isinstance(p.source, Path | bytes | Frame) else id(p.source) for p in conversation.pieces
        )
        # Text-only samples share no picture; each stays by itself.
        groups.setdefault(key or id(conversation), []).append(conversation)
    return list(groups.values())


def draw(unit: tuple[list[Conversation], int | None], rng: random.Random) -> list[Conversation]:
    """The conversations of a unit that one visit trains on."""
    conversations, count = unit
    if count is None or count >= len(conversations):
        return conversations
    return rng.sample(conversations, count)


def fixed_sample(conversations: Sequence[Conversation], count: int | None, *, seed: int = 0) -> list[Conversation]:
    """The same random sample every time, in file order."""
    if count is None or count >= len(conversations):
        return list(conversations)
    chosen = sorted(random.Random(seed).sample(range(len(conversations)), count))
    return [conversations[i] for i in chosen]


def _starter(name: str) -> tuple[str, str]:
    if name not in STARTER:
        raise OpticNerveError(f"unknown starter data {name!r}; known: {', '.join(STARTER)}")
    module, key = STARTER[name]
    made = importlib.import_module(f"opticnerve.starter.{module}").prepare()
    return str(made[key]), str(made["media"])
