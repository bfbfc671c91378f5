"""What a stage will read: how many samples, how many steps, how long they are, and one of them as the model gets it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import TYPE_CHECKING

from opticnerve.data.dataset.dataset import Example, Examples
from opticnerve.data.dataset.load import draw, load_examples, load_streams
from opticnerve.data.dataset.mixture import mixed_shares
from opticnerve.data.dataset.streaming import Streams
from opticnerve.data.encode.packing import Row, first_fit_decreasing, pack, side_by_side
from opticnerve.data.encode.tokenize import Encoded, encode
from opticnerve.language.chat_template import stage_template
from opticnerve.recipe import Stage
from opticnerve.train.metrics import source_names
from opticnerve.types import Conversation, DataError, OpticNerveError

if TYPE_CHECKING:
    from opticnerve.models.vlm.processing import OpticNerveProcessor

LOOK_AT = 96  # rows that are encoded to learn their length


@dataclass(frozen=True)
class SourcePlan:
    """One data entry of several: its examples, its share of the stage's samples, and how often each comes up."""

    name: str
    examples: int
    share: float
    epochs: float


@dataclass
class StageData:
    """A stage's data, as far as it could be read. `rows`: some training rows; `sample`: the first conversation;
    `per_row`: samples (or groups that share a prefix) in a row, more than one where rows are packed ahead; `pictures`:
    how many different ones; `left_out`: records that `where` leaves out (of a stream: among those looked at); `blind`:
    no sample (of a stream: of those looked at) has a picture or a sound; `drawn`: the conversations of a step's rows,
    where an objective has a collator of its own."""

    samples: int = 0
    examples: int = 0
    per_row: float = 1.0
    pictures: int = 0
    steps: int | None = None
    rows: list[Row] = field(default_factory=list)
    longest: int = 0
    sample: Encoded | None = None
    bad: int = 0
    left_out: int = 0
    first_bad: str = ""
    problem: str = ""
    blind: bool = False
    sources: list[SourcePlan] = field(default_factory=list)
    drawn: list[list[Conversation]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Mean tokens of a row."""
        return round(sum(map(len, self.rows)) / len(self.rows)) if self.rows else 0

    @property
    def supervised(self) -> float:
        """Mean supervised tokens of a row."""
        return sum(t != -100 for r in self.rows for t in r.targets) / len(self.rows) if self.rows else 0.0

    def media(self, modality: str) -> float:
        """Mean pictures (or sounds) of a row."""
        if not self.rows:
            return 1.0
        return sum(len(r.images if modality == "image" else r.audios) for r in self.rows) / len(self.rows)


def inspect_data(stage: Stage, processor: OpticNerveProcessor, *, seed: int) -> StageData:
    """Read a stage's data as training does, and encode some rows of it. What cannot be read is noted, not raised.

    Of streamed data the first rows, for no more is known: how many samples and pictures there are stays 0.
    """
    found = StageData(steps=stage.steps)
    bad: list[DataError] = []
    examples: Sequence[Example]
    try:
        if stage.data[0].streaming:
            streams = load_streams(stage, seed=seed)
            examples = list(_first(streams, bad))
            found.left_out = sum(s.left_out for s in streams.streams)
            found.blind = bool(examples) and not any(c.pieces for conversations, _ in examples for c in conversations)
        else:
            examples = loaded = load_examples(stage.data, on_error=bad.append)
            found.examples, found.samples, found.pictures = len(loaded), loaded.samples(), loaded.pictures()
            found.blind, found.left_out = not loaded.with_media(), loaded.left_out()
    except OpticNerveError as e:
        found.problem = str(e)
        return found
    if processor is not None and stage.objective.type == "next_token" and examples:
        _encode_some(found, examples, stage, processor, seed, bad)
    elif stage.objective.type != "next_token" and examples:
        found.drawn = list(_draw_step(examples, stage, seed))
    if found.steps is None:
        count = len(streams) if stage.data[0].streaming else len(examples) / found.per_row
        found.steps = max(1, math.ceil(count * (stage.epochs or 1) / stage.batch_size))
    found.bad, found.first_bad = len(bad), str(bad[0]) if bad else ""
    if not stage.data[0].streaming and len(stage.data) > 1:
        found.sources = list(_sources(stage, loaded, found.steps * stage.batch_size * found.per_row))
    return found


def _sources(stage: Stage, loaded: Examples, samples: float) -> Iterator[SourcePlan]:
    sizes = [len(entry) for entry in loaded.entries]
    shares = mixed_shares(stage, sizes) or [size / sum(sizes) for size in sizes]
    for name, entry, share in zip(source_names(stage.data), loaded.entries, shares, strict=True):
        yield SourcePlan(name, entry.once, share, samples * share / entry.once)


def _first(streams: Streams, bad: list[DataError]) -> Iterator[Example]:
    for index in range(LOOK_AT):
        try:
            yield streams.example(index)
        except DataError as e:
            bad.append(e)


def _draw_step(examples: Sequence[Example], stage: Stage, seed: int) -> Iterator[list[Conversation]]:
    """As many rows as a step takes, all of the data again and again where there are fewer."""
    rng = random.Random(seed)
    order = rng.sample(range(len(examples)), min(stage.batch_size, len(examples)))
    for number in islice(cycle(order), stage.batch_size):
        yield list(draw(examples[number], rng))


def _encode_some(
    found: StageData, examples: Sequence[Example], stage: Stage, processor: OpticNerveProcessor, seed: int,
    bad: list[DataError],
) -> None:  # fmt: skip
    template = stage_template(stage.template, processor.tokenizer)
    rng = random.Random(seed)
    # The first unit is the one that is shown; the others are a fair sample of lengths.
    chosen = [0, *rng.sample(range(1, len(examples)), min(LOOK_AT - 1, len(examples) - 1))]
    for example in (examples[number] for number in chosen):
        try:
            encoded = [encode(c, processor, template=template, max_length=stage.max_length) for c in draw(example, rng)]
        except DataError as e:
            bad.append(e)
            continue
        found.longest = max(found.longest, *(len(e.input_ids) for e in encoded))
        found.sample = found.sample or encoded[0]
        found.rows.append(pack([encoded]))
    tokens = getattr(stage.pack, "tokens", None)
    if tokens and found.rows:
        apart = found.rows
        together = first_fit_decreasing([len(r) for r in apart], tokens)
        found.rows = [side_by_side([apart[i] for i in row]) for row in together]
        found.per_row = len(apart) / len(found.rows)
