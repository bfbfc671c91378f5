"""Samples looked at before the first step, so that a bad one is found now and not hours in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opticnerve.data.dataset.dataset import Example, ExampleSubset
from opticnerve.data.encode.packing import shared_prefix
from opticnerve.data.encode.tokenize import Encoded, encode
from opticnerve.data.media.transform import open_for
from opticnerve.recipe import Stage
from opticnerve.train.sampler import Collate
from opticnerve.types import Conversation, DataError, OpticNerveError

MOST_CHECKED = 10_000


def samples_to_check(stage: Stage) -> int:
    """How many samples are looked at before the first step: a stage of few steps need not wait for what it will hardly
    see, and a long one not for all of a big file."""
    if stage.steps is None or not (stage.pack is None or isinstance(stage.pack, int)):
        return MOST_CHECKED
    seen = stage.steps * stage.batch_size * max(s.per_image or 1 for s in stage.data)
    return min(MOST_CHECKED, max(1_000, 2 * seen))


def precheck(
    examples: Sequence[Example],
    processor: Any,
    stage: Stage,
    *,
    template: str | None = None,
    on_error: Callable[[DataError], None] | None = None,
    check: int = MOST_CHECKED,
    collate: Collate | None = None,
) -> Sequence[Example]:
    """Encode up to `check` samples and open their pictures before the first step, so that a bad one is found now and
    not hours in. (`opticnerve data check` goes through all.)

    `collate`: an objective's own, which then does the looking. With `on_error`, bad samples are handed to it and left
    out; without, the first one is raised.
    """
    seen = 0
    opened: set[Path] = set()
    none_left: set[int] = set()
    some_left: dict[int, list[int]] = {}
    for number in range(len(examples)):
        if seen >= check:
            break
        conversations, count = examples[number]
        kept: list[int] = []
        encoded: list[Encoded] = []
        for place, conversation in enumerate(conversations):
            seen += 1
            try:
                if collate is not None:
                    if seen <= check:
                        getattr(collate, "check", lambda c: collate([[c]]))(conversation)
                elif seen <= check:
                    made = encode(conversation, processor, template=template, max_length=stage.max_length)
                    _open_once(conversation, opened, processor.image_processor)  # sounds were opened to be counted
                    if count != 1:  # one at a time shares nothing
                        shared_prefix([*encoded[:1], made])
                    encoded.append(made)
                kept.append(place)
            except DataError as e:
                if on_error is None:
                    raise
                on_error(e)
        if not kept:
            none_left.add(number)
        elif len(kept) < len(conversations):
            some_left[number] = kept
    if len(none_left) == len(examples):
        raise OpticNerveError(f"stage {stage.name}: no usable sample is left")
    if not none_left and not some_left:
        return examples
    numbers = np.delete(np.arange(len(examples), dtype=np.uint32), sorted(none_left))
    return ExampleSubset(examples, numbers, {int(np.searchsorted(numbers, n)): kept for n, kept in some_left.items()})


def _open_once(conversation: Conversation, opened: set[Path], image_processor: Any) -> None:
    """Open each picture file that has not been looked at yet; only good ones are remembered."""
    for image in conversation.images:
        if not isinstance(image.source, Path) or image.source not in opened:
            open_for(image_processor, image.source, where=conversation.where or conversation.id)
            if isinstance(image.source, Path):
                opened.add(image.source)
