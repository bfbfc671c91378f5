"""Which samples each step sees: a function of seed, stage and step alone, so that a resumed run sees the same."""

from __future__ import annotations

import copy
import math
import random
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, overload

from torch.utils.data import Dataset

from opticnerve.data.collators.next_token import Batch, Collator
from opticnerve.data.dataset.dataset import Example
from opticnerve.data.dataset.load import draw
from opticnerve.data.encode.packing import PackPlan, Row, deal, fit, pack, side_by_side
from opticnerve.data.encode.tokenize import Encoded, encode
from opticnerve.data.media.audio import RATE, open_audio
from opticnerve.data.media.transform import open_for
from opticnerve.recipe import Stage
from opticnerve.types import AudioPart, Conversation, DataError, Frame, ImagePart, OpticNerveError

# What an objective makes of the conversations of each row of a micro-batch.
Collate = Callable[[Sequence[Sequence[Conversation]]], Any]
_STORED = Path | bytes | Frame  # what names a picture by value


class Pictures(Sequence[tuple[Any, str]]):
    """Different pictures among the samples of some rows, each with the sample that shows it first.

    Ten bytes a picture, and while they are looked for a hash of each; its sample is read again when it is asked for.
    """

    def __init__(self, row: Callable[[int], Sequence[Conversation]], rows: int) -> None:
        self._row = row
        self._places = array("I"), array("H"), array("I")  # row, sample of the row, picture of the sample
        seen: set[int] = set()
        for number in range(rows):
            for sample, conversation in enumerate(row(number)):
                for picture, image in enumerate(conversation.images):
                    key = hash(image.source) if isinstance(image.source, _STORED) else id(image.source)
                    if key not in seen:
                        seen.add(key)
                        for place, value in zip(self._places, (number, sample, picture), strict=True):
                            place.append(value)

    def __len__(self) -> int:
        return len(self._places[0])

    @overload
    def __getitem__(self, number: int) -> tuple[Any, str]: ...
    @overload
    def __getitem__(self, number: slice) -> list[tuple[Any, str]]: ...
    def __getitem__(self, number: int | slice) -> tuple[Any, str] | list[tuple[Any, str]]:
        if isinstance(number, slice):
            return [self[n] for n in range(len(self))[number]]
        row, sample, picture = (place[number] for place in self._places)
        conversation = self._row(row)[sample]
        return conversation.images[picture].source, conversation.where or conversation.id


class StageSampler(Dataset[Batch]):
    """The micro-batches of a stage, in order; item `i` is micro-batch `i % accumulate` of step `i // accumulate`.

    A sample is one use of a unit (a sample, or the samples that share a prefix). A row of a batch is one sample, or,
    where `pack` plans ahead, several: all samples are then tokenised here, to know their lengths, and no picture is
    opened.

    Args:
        units: what `data.source.load_units` gave; samples are read from it when they are visited.
        rank, world: this process and how many there are; each takes every world-th row of a micro-batch (of planned
            rows, such that all processes have nearly as many tokens).
        collate: an objective's own way from the conversations of each row to a batch, instead of tokens with labels.
        on_error: is told each bad sample that a good one stands in for, in the process that trains.
    """

    def __init__(
        self, examples: Sequence[Example], stage: Stage, processor: Any, *, seed: int, rank: int = 0, world: int = 1,
        template: str | None = None, collate: Collate | None = None,
        on_error: Callable[[DataError], None] | None = None,
    ) -> None:  # fmt: skip
        if stage.batch_size % (stage.accumulate * world):
            raise OpticNerveError(
                f"stage {stage.name}: batch_size {stage.batch_size} does not split evenly over {stage.accumulate} "
                f"micro-batches and {world} processes; change one of the three"
            )
        self.examples, self.stage, self.processor, self.template = examples, stage, processor, template
        self.seed, self.rank, self.world = seed, rank, world
        self.collate: Any = Collator(processor) if collate is None else collate
        self.own_collate, self.on_error = collate, on_error
        self._left_out: deque[DataError] = deque(maxlen=1000)  # since they were last taken
        self._met: dict[str, DataError] = {}
        extractor = getattr(processor, "feature_extractor", None)
        self.rate = extractor.sampling_rate if extractor is not None else RATE
        self._orders: dict[int, array[int]] = {}
        self.plan: PackPlan | None = None
        if stage.steps is None:
            self.num_samples = math.ceil(len(examples) * (stage.epochs or 1))
        self.steps = stage.steps or max(1, math.ceil(self.num_samples / stage.batch_size))
        if stage.pack is not None and not isinstance(stage.pack, int):
            self.plan = self._plan(stage.pack)
        else:
            self.num_samples = self.steps * stage.batch_size

    def use_features(self, store: Any) -> None:
        """Take what the frozen vision encoder saw from a `FeatureStore` instead of opening pictures."""
        self.collate.features = store

    def pictures(self) -> Pictures:
        """Every picture that the stage sees, once where it is a file, with the sample that shows it."""
        if (
            self.num_samples < len(self.examples) and self.stage.bad_samples == "refuse"
        ):  # nothing stands in for another
            return Pictures(self.drawn, self.num_samples)
        return Pictures(lambda example: self.examples[example][0], len(self.examples))

    def take_left_out(self) -> list[DataError]:
        """The bad samples that were left out since this was last asked; `data.loader` brings them from its workers."""
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

    def whole(self) -> StageSampler:
        """The same samples as one process alone sees them."""
        alone = copy.copy(self)
        alone.rank, alone.world = 0, 1
        return alone

    def __len__(self) -> int:
        return self.steps * self.stage.accumulate

    def __getitem__(self, index: int) -> Batch:
        if self.plan is not None:
            step, micro_batch = divmod(index, self.stage.accumulate)
            first = step * self.stage.batch_size
            lengths = self.plan.lengths[first : first + self.stage.batch_size]
            dealt = deal(lengths, accumulate=self.stage.accumulate, world=self.world)[self.rank][micro_batch]
            return self.collate([self.planned_row(first + r) for r in dealt])
        rows = self.stage.batch_size // self.stage.accumulate
        mine = range(index * rows + self.rank, (index + 1) * rows, self.world)
        if self.own_collate is not None:
            return self.own_collate([self._prechecked(v) for v in mine])
        apart = [self.row(v) for v in mine]
        return self.collate(fit(apart, self.stage.pack) if isinstance(self.stage.pack, int) else apart)

    def row(self, index: int) -> Row:
        """The row of one sample, its pictures opened. Where bad samples are skipped, the next good sample stands in."""
        last: DataError | None = None
        for nearby in self.nearby(index):
            try:
                return self._opened(nearby)
            except DataError as e:
                if self.stage.bad_samples == "refuse":
                    raise
                self._left_out.append(e)
                last = e
        assert last is not None
        raise last

    def planned_row(self, number: int) -> Row:
        """A row of the plan. Where bad samples are skipped, they are left out; were all bad, a good one stands in."""
        assert self.plan is not None
        good = []
        for index in self.plan[number]:
            try:
                good.append(self._opened(index))
            except DataError as e:
                if self.stage.bad_samples == "refuse":
                    raise
                self._left_out.append(e)
        return side_by_side(good or [self.row(self.plan[number][0])])

    def _opened(self, index: int) -> Row:
        row = pack([self._encode(self.drawn(index))])
        if self.collate.features is None:
            row.images = [
                ImagePart(open_for(self.processor.image_processor, i.source, where=row.ids[0])) for i in row.images
            ]
        else:
            for i in row.images:
                self.collate.features.check(i.source, row.ids[0])
        row.audios = [AudioPart(open_audio(a.source, where=row.ids[0], rate=self.rate)) for a in row.audios]
        return row

    def _plan(self, spec: Any) -> PackPlan:
        """As many rows as the stage's steps take; where epochs say how long it is, all of their samples and no more
        than what fills the last step beside them."""
        known = array("i", [0]) * len(self.examples)  # tokens of the units that are the same each time; -1: a bad one

        def length(index: int) -> int | None:
            example = self._example(index)
            if self.examples[example][1] is not None or not known[example]:
                try:
                    known[example] = len(pack([self._encode(self.drawn(index))]))
                except DataError as e:
                    if self.stage.bad_samples == "refuse":
                        raise
                    self.leave_out([e])
                    known[example] = -1
            return known[example] if known[example] > 0 else None

        key = f"{self.seed}/{self.stage.name}/pack"
        plan = PackPlan(length, tokens=spec.tokens, window=spec.window, key=key)
        if self.stage.steps is None:
            while plan.planned < self.num_samples:
                plan.extend(stop=self.num_samples)
            self.steps = max(1, math.ceil(len(plan) / self.stage.batch_size))
        while len(plan) < self.steps * self.stage.batch_size:
            if not len(plan) and plan.planned >= len(self.examples):
                raise OpticNerveError(f"stage {self.stage.name}: no usable sample is left")
            plan.extend()
        self.num_samples = plan.planned
        return plan

    def _prechecked(self, index: int) -> list[Conversation]:
        """The conversations of one sample; where bad samples are skipped, of the next good one."""
        assert self.own_collate is not None
        if self.stage.bad_samples == "refuse":
            return self.drawn(index)
        last: DataError | None = None
        for nearby in self.nearby(index):
            try:
                conversations = self.drawn(nearby)
                self.own_collate([conversations])
                return conversations
            except DataError as e:
                self._left_out.append(e)
                last = e
        assert last is not None
        raise last

    def drawn(self, index: int) -> list[Conversation]:
        """The conversations that the index-th row of the stage trains on."""
        example = self.examples[self._example(index)]
        return draw(example, random.Random(f"{self.seed}/{self.stage.name}/{index}"))

    def nearby(self, index: int) -> range:
        """The samples of which the first good one is made, where bad samples are skipped."""
        return range(index, index + len(self.examples))

    def _example(self, index: int) -> int:
        epoch, place = divmod(index, len(self.examples))
        return self._order(epoch)[place]

    def _order(self, epoch: int) -> array[int]:
        if epoch not in self._orders:
            order = array("I", range(len(self.examples)))
            random.Random(f"{self.seed}/{self.stage.name}/epoch {epoch}").shuffle(order)
            # Two epochs at a time, for a row may hold the end of one and the beginning of the next; no more, so that
            # nothing grows with their number.
            self._orders = {**dict(list(self._orders.items())[-1:]), epoch: order}
        return self._orders[epoch]

    def _encode(self, conversations: list[Conversation]) -> list[Encoded]:
        return [
            encode(c, self.processor, template=self.template, max_length=self.stage.max_length) for c in conversations
        ]
