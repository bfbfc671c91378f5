"""The samples of a stage whose data are streamed: the same micro-batches, with rows that no index leads to."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from opticnerve.data.dataset.streaming import Streams
from opticnerve.recipe import Stage
from opticnerve.train.sampler import Collate, StageSampler
from opticnerve.types import Conversation, DataError, OpticNerveError

MOST_TRIED = 1_000
"""Bad rows one after another, behind each of which a good one is looked for."""
CHECKED = 256
"""Rows that are opened before the first step. They are those of the first steps: no others are at hand."""


class StreamingSampler(StageSampler):
    """As `Visits`, with the rows of `Streams`; every process reads all rows, and opens the pictures of its own."""

    examples: Any

    def __init__(
        self, streams: Streams, stage: Stage, processor: Any, *, seed: int, rank: int = 0, world: int = 1,
        template: str | None = None, collate: Collate | None = None,
        on_error: Callable[[DataError], None] | None = None,
    ) -> None:  # fmt: skip
        rows: Any = streams  # no sequence: a sample leads to its row at once
        super().__init__(
            rows, stage, processor, seed=seed, rank=rank, world=world, template=template, collate=collate,
            on_error=on_error,
        )  # fmt: skip

    def drawn(self, index: int) -> list[Conversation]:
        """The conversation of a sample's row: of several that a row makes, such as an image's captions, one is drawn.

        A row can turn out bad as it is read; where bad samples are skipped, the next good one stands in.
        """
        last: DataError | None = None
        for nearby in self.nearby(index):
            try:
                conversations, _ = self.examples.example(nearby)
            except DataError as e:
                if self.stage.bad_samples == "refuse":
                    raise
                self._left_out.append(e)
                last = e
            else:
                return [random.Random(f"{self.seed}/{self.stage.name}/{nearby}").choice(conversations)]
        assert last is not None
        raise OpticNerveError(f"{MOST_TRIED:,} rows one after another are bad, the last one: {last}") from last

    def nearby(self, index: int) -> range:
        return range(index, index + MOST_TRIED)

    def check(self, most: int) -> None:
        """Open the first rows, so that what is wrong with all of them is found before the first step.

        Raises:
            DataError: one is bad, and the stage refuses bad samples.
            OpticNerveError: more are bad than the stage allows.
        """
        for index in range(min(most, CHECKED, self.num_samples)):
            if self.own_collate is None:
                self.row(index)
            else:
                self._prechecked(index)
        self.leave_out(self.take_left_out())

    def state_delta(self) -> list[Any]:
        """Where windows begin, for the process that saves; `data.loader` brings them from its workers."""
        return self.examples.state_delta()

    def load_state_delta(self, found: list[Any]) -> None:
        self.examples.load_state_delta(found)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "stream": self.examples.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.examples.load_state_dict(state["stream"])
