"""The order of streamed rows in training: shuffled within windows, and a function of seed and sample alone.

Epoch `e` goes through the shards in an order drawn from (seed, e), and cuts what they give into windows of `window`
rows. Window `k` is shuffled by a generator seeded with (seed, e, k). So the row of any sample is known without having
seen those before it: go to its window, read that, shuffle. Where a window begins among the shards is noted as it is
met (a mark: shard and row), and the marks go into the checkpoint: a resumed run opens the shard of its window and reads
on from there. Without marks it reads from the beginning and comes to the same rows.

Memory holds two windows of rows as they are stored, pictures encoded: two, for where a bad sample ends a window the
next window's first row may stand in.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from opticnerve.data.dataset.dataset import Example
from opticnerve.data.dataset.mixture import Mixture
from opticnerve.data.dataset.read import DataSource, open_source, raise_error
from opticnerve.data.sources.base import DamagedShard, Record
from opticnerve.data.sources.streaming import Streamed
from opticnerve.types import DataError, OpticNerveError

Row = Record | DataError
Mark = tuple[int, int, int, int]
"""Epoch, window; and where it begins: how many shards of the epoch's order come before, and rows of the next one."""
MOST_MARKS = 4096


class Stream:
    """The rows of one source, by sample.

    Args:
        key: what seeds the order: seed, stage and entry. window: rows that are shuffled together; 1: none are, nor are
            shards. limit: an epoch is the first so many rows; shards then keep their order, for these to stay the same.
    """

    def __init__(self, source: DataSource, *, key: str, window: int, limit: int | None = None) -> None:
        opened = open_source(source, raise_error)
        assert isinstance(opened.records, Streamed)
        self.records, self.source = opened.records, opened.read()
        self.key, self.window, self.limit = key, window, limit
        self.left_out = 0  # rows that this process has met and `where` leaves out
        self.length: int | None = None  # rows of an epoch, known from its first end on
        self.marks: dict[tuple[int, int], tuple[int, int]] = {}
        self._new: list[Mark] = []
        self._windows: dict[tuple[int, int], list[Row]] = {}
        self._reader: _Reader | None = None

    def example(self, index: int) -> Example:
        """The conversations of a sample's row, of which one is drawn.

        Raises:
            DataError: the row cannot be used.
            OpticNerveError: the stream broke off, or holds no row.
        """
        row = self.row(index)
        if isinstance(row, DataError):
            raise DataError(row.problem, where=row.where, remedy=row.remedy, kind=row.kind)
        return self.source.of(row), 1

    def row(self, index: int) -> Row:
        if self.length is None and self.limit is not None and index >= self.limit:
            self._window(0, (self.limit - 1) // self.window)  # its end, or the stream's before it
        while True:
            epoch, place = (0, index) if self.length is None else divmod(index, self.length)
            number, within = divmod(place, self.window)
            window = self._window(epoch, number)
            if within < len(window):
                return window[within]
            # Epoch 0 ended before this sample: its length is known now, and the sample belongs to a later one.

    def close(self) -> None:
        """Let go of the open shard and of the rows in memory; both come back when they are asked for."""
        self._reader = None
        self._windows.clear()

    def tells(self) -> list[str]:
        """What shows that its rows are others: its shards, and which of their rows are wanted."""
        return [*self.records.shards.tells, *([self.source.where.text] if self.source.where is not None else [])]

    # -- what a checkpoint and other processes get to know --------------------------------------------------------

    def state_delta(self) -> tuple[list[Mark], int | None]:
        """The marks found since they were last taken, and the length of an epoch, if it is known."""
        taken, self._new = self._new, []
        return taken, self.length

    def load_state_delta(self, found: tuple[list[Mark], int | None]) -> None:
        """Marks that this stream had in another process, or before it was stopped."""
        marks, length = found
        for epoch, number, shard, row in marks:
            self._note((epoch, number), (shard, row))
        if length is not None:
            self._ends_at(length)

    def state_dict(self) -> dict[str, Any]:
        return {"marks": [[*at, *place] for at, place in self.marks.items()], "length": self.length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.load_state_delta(([tuple(m) for m in state["marks"]], state["length"]))

    # -- reading --------------------------------------------------------------------------------------------------

    def _window(self, epoch: int, number: int) -> list[Row]:
        at = epoch, number
        if at not in self._windows:
            rows = self._read(epoch, number)
            if self.window > 1:
                random.Random(f"{self.key}/epoch {epoch}/window {number}").shuffle(rows)
            self._windows = {**dict(list(self._windows.items())[-1:]), at: rows}
        return self._windows[at]

    def _read(self, epoch: int, number: int) -> list[Row]:
        """The rows of a window as they lie. A short one ends its epoch."""
        reader = self._reader
        # A process that was forked shares its parent's open files, and with them the place in each.
        if reader is None or (reader.epoch, reader.number, reader.process) != (epoch, number, os.getpid()):
            reader = self._reader = None
            reader = self._open(epoch, number)
            if reader.number < number:
                return []  # the epoch ended before it
        rows = list(islice(reader.rows, self._size(number)))
        reader.number += 1
        if len(rows) < self.window or self.limit == number * self.window + len(rows):
            self._ends_at(number * self.window + len(rows))
            self._reader = None
        else:
            self._reader = reader
            self._note((epoch, number + 1), (reader.shard, reader.row), new=True)
        return rows

    def _open(self, epoch: int, number: int) -> _Reader:
        known = max((n for e, n in self.marks if e == epoch and n <= number), default=0)
        shard, row = self.marks.get((epoch, known), (0, 0))
        reader = _Reader(self.records, self._wanted, self._shards(epoch), shard, row, epoch, known)
        while reader.number < number:
            passed = sum(1 for _ in islice(reader.rows, self._size(reader.number)))
            if passed < self.window:
                self._ends_at(reader.number * self.window + passed)
                break
            reader.number += 1
            self._note((epoch, reader.number), (reader.shard, reader.row), new=True)
        return reader

    def _wanted(self, row: Row) -> Row | None:
        """A row, or what is wrong with it; None if the entry's `where` leaves it out."""
        if isinstance(row, DataError):
            return row
        try:
            if self.source.wants(row):
                return row
        except DataError as e:
            return e
        self.left_out += 1
        return None

    def _size(self, number: int) -> int:
        """Rows that window `number` may have."""
        return self.window if self.limit is None else max(0, min(self.window, self.limit - number * self.window))

    def _shards(self, epoch: int) -> list[int]:
        order = list(range(len(self.records)))
        if self.window > 1 and self.limit is None:
            random.Random(f"{self.key}/epoch {epoch}/shards").shuffle(order)
        return order

    def _ends_at(self, length: int) -> None:
        where = str(self.records.path)
        if length == 0:
            if self.source.where is not None:
                raise self.source.where.met_by_none(where)
            raise DataError("there is no record in it", where=where, remedy="name another", kind="empty-file")
        if self.length is not None and length != self.length:
            raise OpticNerveError(  # no bad sample that could be skipped
                f"{where}: an epoch had {self.length:,} rows and now ends after {length:,}: the data have changed. "
                f"Name a revision, or leave the files alone, and start again",
                kind="mismatch",
            )
        self.length = length

    def _note(self, at: tuple[int, int], place: tuple[int, int], *, new: bool = False) -> None:
        if at in self.marks:
            return
        self.marks[at] = place
        if new:
            self._new.append((*at, *place))
        if len(self.marks) > MOST_MARKS:  # the older half: going on needs the newest, and the others can be found again
            self.marks = dict(sorted(self.marks.items())[MOST_MARKS // 2 :])


class _Reader:
    """A place in an epoch that moves on: behind `row` rows of the `shard`-th shard of its order, wanted or not."""

    def __init__(
        self, records: Streamed, wanted: Callable[[Row], Row | None], order: Sequence[int], shard: int, row: int,
        epoch: int, number: int,
    ) -> None:  # fmt: skip
        self.records, self.wanted, self.order, self.shard, self.row = records, wanted, order, shard, row
        self.epoch, self.number, self.process = epoch, number, os.getpid()
        self.rows = self._rows()

    def _rows(self) -> Iterator[Row]:
        while self.shard < len(self.order):
            for item in self.records.rows(self.order[self.shard], self.row):
                if isinstance(item, DamagedShard):  # a mark behind it would lead to rows that were not seen
                    self.shard, self.row = self.shard + 1, 0
                    yield item
                    break
                self.row += 1
                if (row := self.wanted(item)) is not None:
                    yield row
            else:
                self.shard, self.row = self.shard + 1, 0


class Streams:
    """The streams of a stage, in turns: `turns[i]` rows of stream i, then those of the next, and around again; or as a
    mixture says.

    Each goes through its own epochs, however long the others are.
    """

    def __init__(self, streams: Sequence[Stream], turns: Sequence[int], mixture: Mixture | None = None) -> None:
        self.streams, self.mixture = streams, mixture
        self._round = [(i, k) for i, turn in enumerate(turns) for k in range(turn)]
        self._turns = turns

    def __len__(self) -> int:
        """Rows of an epoch.

        Raises:
            OpticNerveError: that is not known beforehand.
        """
        if len(self.streams) == 1 and self.streams[0].limit is not None:
            return self.streams[0].limit
        raise OpticNerveError("a stream does not say how long it is; give the stage steps", kind="missing-field")

    def example(self, index: int) -> Example:
        stream, own = self._place(index)
        return self.streams[stream].example(own)

    def source_of(self, index: int) -> int:
        return self._place(index)[0]

    def _place(self, index: int) -> tuple[int, int]:
        """The stream of a sample, and which of its rows."""
        if self.mixture is not None:
            return self.mixture[index]
        turn, at = divmod(index, len(self._round))
        stream, own = self._round[at]
        return stream, turn * self._turns[stream] + own

    def close(self) -> None:
        for stream in self.streams:
            stream.close()

    def state_delta(self) -> list[Any]:
        return [stream.state_delta() for stream in self.streams]

    def load_state_delta(self, found: Sequence[Any]) -> None:
        for stream, marks in zip(self.streams, found, strict=True):
            stream.load_state_delta(marks)

    def state_dict(self) -> dict[str, Any]:
        return {"streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for stream, own in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(own)

    def tells(self) -> list[str]:
        """What shows that the data are others: shards with their sizes or revisions, and how they are cut."""
        return [
            f"{s.window} {s.limit} {turn} " + "|".join(s.tells())
            for s, turn in zip(self.streams, self._turns, strict=True)
        ]
