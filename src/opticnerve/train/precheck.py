"""A stage's data before its first step: samples are encoded and their pictures opened, so that a bad one is found now
and not hours in; on the way their lengths are noted, and what they say is hashed.

The hash tells whether a run goes on with the data that it began with. What a step sees follows from seed, step and
data; a changed file would go unnoticed otherwise, and the curve be that of no run.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opticnerve.data.collators.base import open_once
from opticnerve.data.dataset.dataset import Example, ExampleSubset
from opticnerve.data.dataset.streaming import Streams
from opticnerve.data.encode.packing import PackPlan, shared_prefix
from opticnerve.data.encode.tokenize import Encoded, encode
from opticnerve.recipe import Stage
from opticnerve.train.sampler import Collate, StageSampler
from opticnerve.types import Conversation, DataError, Frame, OpticNerveError, TextPart

MOST, FIRST = 10_000, 64
"""So many samples are looked at, and so many examples, evenly spread, are read to tell the data apart (of a stream the
first ones): of larger data a change elsewhere goes unnoticed."""


class Notes:
    """What is learned of good examples as they are looked at, the first one first.

    Attributes:
        lengths: tokens; 0 for an example of several samples, or one that was not encoded.
    """

    def __init__(self) -> None:
        self.lengths, self._said = array("i"), hashlib.sha256()

    def add(self, conversations: Sequence[Conversation], count: int | None, encoded: Sequence[Encoded] = ()) -> None:
        self.lengths.append(len(encoded[0].input_ids) if len(conversations) == len(encoded) == 1 else 0)
        self._said.update(f"\n{count}".encode())
        self.hear(conversations)

    def hear(self, conversations: Sequence[Conversation]) -> None:
        for conversation in conversations:
            self._said.update(_words(conversation).encode(errors="replace"))

    def digest(self) -> str:
        return self._said.hexdigest()[:24]


def samples_to_check(stage: Stage) -> int:
    """How many samples are looked at before the first step: a stage of few steps need not wait for what it will hardly
    see, and a long one not for all of a big file."""
    if stage.steps is None or not (stage.pack is None or isinstance(stage.pack, int)):
        return MOST
    seen = stage.steps * stage.batch_size * max(s.per_image or 1 for s in stage.data)
    return min(MOST, max(1_000, 2 * seen))


def precheck(
    examples: Sequence[Example], processor: Any, stage: Stage, *, template: str | None = None,
    on_error: Callable[[DataError], None] | None = None, check: int = MOST, collate: Collate | None = None,
    notes: Notes | None = None,
) -> Sequence[Example]:  # fmt: skip
    """The examples without the bad samples among the first `check`. (`opticnerve data check` goes through all.)

    Args:
        on_error: takes bad samples; without it, the first one is raised.
        collate: an objective's own, which then does the looking.
        notes: takes each good example that was looked at.
    """
    seen = 0
    opened: set[Path] = set()
    kept: dict[int, list[int]] = {}  # of each example that has bad samples, the good ones
    for number in range(len(examples)):
        if seen >= check:
            break
        conversations, count = examples[number]
        good: list[tuple[int, Conversation]] = []
        encoded: list[Encoded] = []
        for place, conversation in enumerate(conversations):
            seen += 1
            try:
                if seen > check:
                    pass
                elif collate is not None:
                    getattr(collate, "check", lambda c: collate([[c]]))(conversation)
                else:
                    made = encode(conversation, processor, template=template, max_length=stage.max_length)
                    open_once(conversation, processor.image_processor, opened)  # sounds were opened to be counted
                    if count != 1:  # one at a time shares nothing
                        shared_prefix([*encoded[:1], made])
                    encoded.append(made)
                good.append((place, conversation))
            except DataError as e:
                if on_error is None:
                    raise
                on_error(e)
        if len(good) < len(conversations) or not good:
            kept[number] = [place for place, _ in good]
        if good and notes is not None:
            notes.add([c for _, c in good], count, encoded)
    gone = [number for number, places in kept.items() if not places]
    if len(gone) == len(examples):
        raise OpticNerveError(f"stage {stage.name}: no usable sample is left", kind="empty")
    if not kept:
        return examples
    numbers = np.delete(np.arange(len(examples), dtype=np.uint32), gone)
    return ExampleSubset(
        examples, numbers, {int(np.searchsorted(numbers, n)): places for n, places in kept.items() if places}
    )


def fingerprint(sampler: StageSampler, notes: Notes) -> dict[str, Any]:
    """How many examples there are, and hashes of what they say and of how they are packed, the same on every process.

    A file counts by its name alone: the folder may be another on another machine, and its content is not read here. Of
    streamed data the first rows are read, and of the others the shards' names are known, with their sizes (or, on the
    hub, the revision).
    """
    examples = sampler.examples
    if isinstance(examples, Streams):
        for index in range(FIRST):
            notes.hear(sampler.drawn(index))
        examples.close()
        tells = _short_hash("\n".join(examples.tells()).encode(errors="replace"))
        return {"steps": sampler.steps, "shards": tells, "sha256": notes.digest()}
    if not len(notes.lengths) == len(examples) <= MOST:  # not all were looked at
        notes = Notes()
        for number in range(0, len(examples), math.ceil(len(examples) / MOST)):
            notes.add(*examples[number])
    found: dict[str, Any] = {"units": len(examples), "steps": sampler.steps, "sha256": notes.digest()}
    if sampler.plan is not None:
        found |= _planned(sampler.plan, len(sampler.plan))
    return found


def of_length(was: dict[str, Any], now: dict[str, Any], plan: PackPlan | None) -> dict[str, Any]:
    """The fingerprint of data now, for as many steps as they once were to take: samples and rows that come later leave
    those before them as they are."""
    if was["steps"] == now["steps"]:
        return now
    rows = was.get("rows", 0) if plan is not None else 0
    return {**now, "steps": was["steps"], **(_planned(plan, rows) if plan is not None and rows <= len(plan) else {})}


def _planned(plan: PackPlan, rows: int) -> dict[str, Any]:
    """The first rows of a plan."""
    return {"rows": rows, "plan": _short_hash(b"".join(bytes(memoryview(plan[row])) for row in range(rows)))}


def check_same(was: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Refuse to go on with other data.

    Raises:
        OpticNerveError: names what differs, with both values.
    """
    if differs := [f"{k} was {was.get(k)} and is {now.get(k)}" for k in {**was, **now} if was.get(k) != now.get(k)]:
        raise OpticNerveError(
            f"{where} was written on other data: {'; '.join(differs)}. Bring the data back as it was, or train anew in "
            f"another folder",
            kind="mismatch",
        )


def _short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def _words(conversation: Conversation) -> str:
    """What a conversation says, and the names of the files that it shows."""
    said = [conversation.id]
    for message in conversation.messages:
        said.append(message.role)
        for part in message.parts:
            if isinstance(part, TextPart):
                said.append(part.text)
                continue
            source = part.source.source if isinstance(part.source, Frame) else part.source
            name = source.name if isinstance(source, Path) else ""
            size = len(source) if isinstance(source, bytes) else ""
            said.append(f"{type(part).__name__} {name}{size}")
    return "\0".join(said)
