"""Which samples each step sees: a function of seed, stage and step alone, so that a resumed run sees the same."""

from __future__ import annotations

import copy
import math
import random
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset

from opticnerve.data.collators.next_token import Batch, Collator
from opticnerve.data.dataset.dataset import Example, source_ends
from opticnerve.data.dataset.load import draw
from opticnerve.data.dataset.mixture import Mixture, mixed_shares
from opticnerve.data.dataset.streaming import Streams
from opticnerve.data.encode.packing import PackPlan, Row, deal, fit, pack, side_by_side
from opticnerve.data.encode.tokenize import Encoded, encode
from opticnerve.data.media.audio import RATE, open_audio
from opticnerve.data.media.transform import open_for
from opticnerve.recipe import Stage
from opticnerve.types import AudioPart, Conversation, DataError, Frame, OpticNerveError

# What an objective makes of the conversations of each row of a micro-batch.
Collate = Callable[[Sequence[Sequence[Conversation]]], Any]
Made = TypeVar("Made")


class StageSampler(Dataset[Batch]):
    """The micro-batches of a stage, in order; item `i` is micro-batch `i % accumulate` of step `i // accumulate`.

    A sample is one use of an example (a conversation, or those that share a prefix). A row of a batch is one sample,
    or, where `pack` plans ahead, several: all samples are then tokenised here, to know their lengths, and no picture is
    opened.

    Args:
        examples: what `load_examples` gave; conversations are read from it when their turn comes.
        rank, world: this process and how many there are; each takes every world-th row of a micro-batch (of planned
            rows, such that all processes have nearly as many tokens).
        collate: an objective's own way from the conversations of each row to a batch, instead of tokens with labels.
        on_error: is told each bad sample that a good one stands in for, in the process that trains.
        lengths: tokens of the first examples, as far as they are known; 0 for others.
    """

    examples: Any

    def __init__(
        self, examples: Sequence[Example], stage: Stage, processor: Any, *, seed: int, rank: int = 0, world: int = 1,
        template: str | None = None, collate: Collate | None = None,
        on_error: Callable[[DataError], None] | None = None, lengths: Sequence[int] = (),
    ) -> None:  # fmt: skip
        if stage.batch_size % (stage.accumulate * world):
            raise OpticNerveError(
                f"stage {stage.name}: batch_size {stage.batch_size} does not split evenly over {stage.accumulate} "
                f"micro-batches and {world} processes; change one of the three",
                kind="mismatch",
            )
        self.examples, self.stage, self.processor, self.template = examples, stage, processor, template
        self.seed, self.rank, self.world = seed, rank, world
        self.collate: Any = Collator(processor) if collate is None else collate
        self.own_collate, self.on_error = collate, on_error
        self._left_out: deque[DataError] = deque(maxlen=1000)  # since they were last taken
        self._met: dict[str, DataError] = {}
        extractor = getattr(processor, "feature_extractor", None)
        self.rate = extractor.sampling_rate if extractor is not None else RATE
        self._orders: dict[tuple[int, int], array[int]] = {}
        self._ends = [] if isinstance(examples, Streams) else source_ends(examples)
        self.sizes = [end - begin for begin, end in pairwise([0, *self._ends])]
        self.mixture = self._mixed()
        self.plan: PackPlan | None = None
        if stage.steps is None:
            self.num_samples = math.ceil(len(examples) * (stage.epochs or 1))
        self.steps = stage.steps or max(1, math.ceil(self.num_samples / stage.batch_size))
        if stage.pack is not None and not isinstance(stage.pack, int):
            self.plan = self._plan(stage.pack, lengths)
        else:
            self.num_samples = self.steps * stage.batch_size

    # -- batches --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.steps * self.stage.accumulate

    def __getitem__(self, index: int) -> Batch:
        if self.plan is not None:
            step, micro_batch = divmod(index, self.stage.accumulate)
            first = step * self.stage.batch_size
            lengths = self.plan.lengths[first : first + self.stage.batch_size]
            dealt = deal(lengths, accumulate=self.stage.accumulate, world=self.world)[self.rank][micro_batch]
            planned: Batch = self.collate([self.planned_row(first + r) for r in dealt])
            return planned
        rows = self.stage.batch_size // self.stage.accumulate
        return self.batch(range(index * rows + self.rank, (index + 1) * rows, self.world))

    def batch(self, mine: Iterable[int]) -> Batch:
        """The batch of these samples."""
        if self.own_collate is not None:
            good = [self._collatable(v) for v in mine]
            own: Batch = self.own_collate([conversations for conversations, _ in good])
            if hasattr(own, "sources"):
                own.sources = torch.tensor([source for conversations, source in good for _ in conversations])
            return own
        apart = [self.row(v) for v in mine]
        batch: Batch = self.collate(fit(apart, self.stage.pack) if isinstance(self.stage.pack, int) else apart)
        return batch

    def row(self, index: int) -> Row:
        """The row of one sample, its pictures opened. Where bad samples are skipped, the next good sample stands in."""
        return self._first_good(index, self._opened)

    def planned_row(self, number: int) -> Row:
        """A row of the plan. Where bad samples are skipped, they are left out; were all bad, a good one stands in."""
        assert self.plan is not None
        good = []
        for index in self.plan[number]:
            try:
                good.append(self._opened(index))
            except DataError as e:
                self._leave_out_or_raise(e)
        return side_by_side(good or [self.row(self.plan[number][0])])

    def _collatable(self, index: int) -> tuple[list[Conversation], int]:
        """The conversations of one sample that the objective's own collator takes, and the sample's data entry."""

        def tried(nearby: int) -> tuple[list[Conversation], int]:
            conversations = self.drawn(nearby)
            if self.stage.bad_samples != "refuse":
                assert self.own_collate is not None
                self.own_collate([conversations])
            return conversations, self.source_of(nearby)

        return self._first_good(index, tried)

    def _first_good(self, index: int, make: Callable[[int], Made]) -> Made:
        """What `make` gives for a sample; where bad samples are skipped, for the first good one from there on."""
        last: DataError | None = None
        for nearby in self.nearby(index):
            try:
                return make(nearby)
            except DataError as e:
                self._leave_out_or_raise(e)
                last = e
        assert last is not None
        raise last

    def _leave_out_or_raise(self, error: DataError) -> None:
        if self.stage.bad_samples == "refuse":
            raise error
        self._left_out.append(error)

    def _opened(self, index: int) -> Row:
        row = pack([self._encode(self.drawn(index))])
        row.sources = [self.source_of(index)]
        where = row.ids[0]
        if self.collate.features is None:
            row.images = [
                replace(i, source=open_for(self.processor.image_processor, i.source, where=where)) for i in row.images
            ]
        else:
            for i in row.images:
                self.collate.features.check(i.source, where)
        row.audios = [AudioPart(open_audio(a.source, where=where, rate=self.rate)) for a in row.audios]
        return row

    def _encode(self, conversations: list[Conversation]) -> list[Encoded]:
        return [
            encode(c, self.processor, template=self.template, max_length=self.stage.max_length) for c in conversations
        ]

    # -- which samples --------------------------------------------------------------------------------------------

    def drawn(self, index: int) -> list[Conversation]:
        """The conversations that the index-th row of the stage trains on."""
        example = self.examples[self._example(index)]
        return draw(example, random.Random(f"{self.seed}/{self.stage.name}/{index}"))

    def source_of(self, index: int) -> int:
        """Which of the stage's data entries a sample is of."""
        return bisect_right(self._ends, self._example(index)) if self.mixture is None else self.mixture[index][0]

    def nearby(self, index: int) -> Iterable[int]:
        """The samples of which the first good one is made, where bad samples are skipped: in a mixture those of the
        same source."""
        if self.mixture is None:
            return range(index, index + len(self.examples))
        return self.mixture.following(index, self.sizes[self.mixture[index][0]])

    def whole(self) -> StageSampler:
        """The same samples as one process alone sees them."""
        alone = copy.copy(self)
        alone.rank, alone.world = 0, 1
        return alone

    def pictures(self) -> list[tuple[Any, str]]:
        """The different pictures that the stage sees, each with the sample that shows it first."""
        rows: Callable[[int], Sequence[Conversation]] = self.drawn
        count = self.num_samples
        if count >= len(self.examples) or self.stage.bad_samples != "refuse":  # or one may stand in for another
            rows, count = (lambda example: self.examples[example][0]), len(self.examples)
        found: dict[Any, tuple[Any, str]] = {}
        for number in range(count):
            for conversation in rows(number):
                for image in conversation.images:
                    source = image.source
                    key = source if isinstance(source, Path | bytes | Frame) else id(source)
                    found.setdefault(key, (source, conversation.where or conversation.id))
        return list(found.values())

    def _plan(self, spec: Any, lengths: Sequence[int]) -> PackPlan:
        """As many rows as the stage's steps take; where epochs say how long it is, all of their samples and no more
        than what fills the last step beside them."""
        # Tokens of the examples that are the same each time; 0: not known, -1: a bad one.
        known = array("i", lengths) + array("i", [0]) * (len(self.examples) - len(lengths))

        def length(index: int) -> int | None:
            number, fixed = self._example(index), True
            if not (tokens := known[number]):
                try:
                    fixed = self.examples[number][1] is None
                    tokens = len(pack([self._encode(self.drawn(index))]))
                except DataError as e:
                    if self.stage.bad_samples == "refuse":
                        raise
                    self.leave_out([e])
                    tokens = -1
                if fixed:
                    known[number] = tokens
            return tokens if tokens > 0 else None

        key = f"{self.seed}/{self.stage.name}/pack"
        plan = PackPlan(length, tokens=spec.tokens, window=spec.window, key=key)
        if self.stage.steps is None:
            while plan.planned < self.num_samples:
                plan.extend(stop=self.num_samples)
            self.steps = max(1, math.ceil(len(plan) / self.stage.batch_size))
        while len(plan) < self.steps * self.stage.batch_size:
            if not len(plan) and plan.planned >= len(self.examples):
                raise OpticNerveError(f"stage {self.stage.name}: no usable sample is left", kind="empty")
            plan.extend()
        self.num_samples = plan.planned
        return plan

    def _mixed(self) -> Mixture | None:
        shares = mixed_shares(self.stage, self.sizes)
        if shares is None:
            return None
        return Mixture(shares, block=self.stage.batch_size, key=f"{self.seed}/{self.stage.name}")

    def _example(self, index: int) -> int:
        if self.mixture is None:
            epoch, place = divmod(index, len(self.examples))
            return self._order(epoch, len(self.examples))[place]
        source, own = self.mixture[index]
        epoch, place = divmod(own, self.sizes[source])
        return self._ends[source] - self.sizes[source] + self._order(epoch, self.sizes[source], source)[place]

    def _order(self, epoch: int, count: int, source: int | None = None) -> array[int]:
        """The examples of an epoch: of all sources, or in a mixture of one."""
        at = -1 if source is None else source, epoch
        if at not in self._orders:
            order = array("I", range(count))
            of = "" if source is None else f"source {source}/"
            random.Random(f"{self.seed}/{self.stage.name}/{of}epoch {epoch}").shuffle(order)
            # Two epochs at a time, for a row may hold the end of one and the beginning of the next; no more, so that
            # nothing grows with their number.
            before = [k for k in self._orders if k[0] == at[0]][:-1]
            self._orders = {k: v for k, v in self._orders.items() if k not in before} | {at: order}
        return self._orders[at]

    # -- bad samples ----------------------------------------------------------------------------------------------

    def take_left_out(self) -> list[DataError]:
        """The bad samples that were left out since this was last asked; the loader brings them from its workers."""
        taken = list(self._left_out)
        self._left_out.clear()
        return taken

    def leave_out(self, errors: Iterable[DataError]) -> None:
        """Tell of bad samples, each once.

        Raises:
            OpticNerveError: there are more of them than the stage allows.
        """
        for error in errors:
            if str(error) not in self._met:
                self._met[str(error)] = error
                if self.on_error is not None:
                    self.on_error(error)

    def state_dict(self) -> dict[str, Any]:
        """What is not a function of seed and step: the bad samples that were met on the way."""
        return {"left_out": [[e.problem, e.where, e.remedy, e.kind] for e in self._met.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave, so that samples which were left out before stay counted."""
        self.leave_out(DataError(p, where=w, remedy=r, kind=k) for p, w, r, k in state["left_out"])


# -- streamed data ----------------------------------------------------------------------------------------------------

MOST_TRIED = 1_000
"""Bad rows one after another, behind each of which a good one is looked for."""
CHECKED = 256
"""Rows that are opened before the first step. They are those of the first steps: no others are at hand."""


class StreamingSampler(StageSampler):
    """The same micro-batches of `Streams`, whose rows no index leads to; every process reads all rows, and opens the
    pictures of its own. The further arguments are those of `StageSampler`."""

    def __init__(self, streams: Streams, stage: Stage, processor: Any, **options: Any) -> None:
        rows: Any = streams  # no sequence: a sample leads to its row at once
        super().__init__(rows, stage, processor, **options)

    def drawn(self, index: int) -> list[Conversation]:
        """The conversation of a sample's row: of several that a row makes, such as an image's captions, one is drawn.

        A row can turn out bad as it is read; where bad samples are skipped, the next good one stands in.
        """

        def read(nearby: int) -> list[Conversation]:
            conversations, _ = self.examples.example(nearby)
            return [random.Random(f"{self.seed}/{self.stage.name}/{nearby}").choice(conversations)]

        try:
            return self._first_good(index, read)
        except DataError as e:
            if self.stage.bad_samples == "refuse":
                raise
            raise OpticNerveError(
                f"{MOST_TRIED:,} rows one after another are bad, the last one: {e}", kind="bad-samples"
            ) from e

    def source_of(self, index: int) -> int:
        source: int = self.examples.source_of(index)
        return source

    def nearby(self, index: int) -> Iterable[int]:
        mixture = self.examples.mixture
        return range(index, index + MOST_TRIED) if mixture is None else mixture.following(index, MOST_TRIED)

    def _mixed(self) -> None:
        """The streams know it."""

    def check(self, most: int) -> None:
        """Open the first rows, so that what is wrong with all of them is found before the first step.

        Raises:
            DataError: one is bad, and the stage refuses bad samples.
            OpticNerveError: more are bad than the stage allows.
        """
        for index in range(min(most, CHECKED, self.num_samples)):
            _ = self.row(index) if self.own_collate is None else self._collatable(index)
        self.leave_out(self.take_left_out())

    def state_delta(self) -> list[Any]:
        """Where windows begin, for the process that saves; the loader brings them from its workers."""
        marks: list[Any] = self.examples.state_delta()
        return marks

    def load_state_delta(self, found: list[Any]) -> None:
        self.examples.load_state_delta(found)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "stream": self.examples.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.examples.load_state_dict(state["stream"])
