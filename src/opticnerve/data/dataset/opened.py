"""A source whose format is known: which of its records are wanted, and what conversations they make."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path

from opticnerve.data.formats.base import DataFormat
from opticnerve.data.formats.columns import Columns
from opticnerve.data.formats.converters import conversations
from opticnerve.data.formats.fields import Fields
from opticnerve.data.formats.media import Context
from opticnerve.data.formats.rules import check_conversation, check_unread, repaired
from opticnerve.data.formats.where import Where
from opticnerve.data.media.files import errors_at
from opticnerve.data.media.web import AT_ONCE
from opticnerve.data.sources.base import Record, Records, refused
from opticnerve.data.sources.paths import known_split
from opticnerve.types import Conversation, DataError

OnError = Callable[[DataError], None]


@dataclass
class OpenSource:
    """A source whose format is known: its records, and what makes conversations of them."""

    records: Records
    format: DataFormat
    columns: Columns
    context: Context
    ignore: frozenset[str]
    repair: Sequence[str]
    head: list[Record | DataError]
    remaining: Iterator[Record | DataError]
    split: RecordSplit
    where: Where | None = None

    def wants(self, record: Record) -> bool:
        """Whether a record meets the condition of the data entry.

        Raises:
            DataError: that cannot be told.
        """
        if self.where is None:
            return True
        with errors_at(record.where):
            return self.where.keeps(record.fields, lambda: self.columns.applied(record.fields))

    def converted(
        self, on_error: OnError, left_out: Counter[str] | None = None
    ) -> Iterator[tuple[Record, int, Conversation]]:
        """All good conversations, once: the record of each, and which of that record's it is. `left_out` counts the
        records that `where` leaves out, under it."""
        wanted = self._wanted(Counter() if left_out is None else left_out)
        for record, made in self._side_by_side(wanted) if self.context.cache else ((r, self._made(r)) for r in wanted):
            for part in count():
                # Only our own work stands in the try: an error of the caller, thrown at a yield, is not a bad sample.
                try:
                    conversation = next(made, None)
                except DataError as e:
                    on_error(e)
                    break
                if conversation is None:
                    break
                try:
                    check_conversation(conversation)
                except DataError as e:
                    on_error(e)
                    continue
                assert isinstance(record, Record)
                yield record, part, conversation

    def _wanted(self, left_out: Counter[str]) -> Iterator[Record | DataError]:
        """The records that are wanted, and what is wrong with others."""
        for record in chain(self.head, self.remaining):
            if isinstance(record, DataError):
                yield record
            elif self.split.wants(record):
                try:
                    wanted = self.wants(record)
                except DataError as e:
                    yield e
                    continue
                if wanted:
                    yield record
                elif self.where is not None:
                    left_out[self.where.text] += 1

    def _side_by_side(
        self, records: Iterable[Record | DataError]
    ) -> Iterator[tuple[Record | DataError, Iterator[Conversation]]]:
        """As `_made`, in the same order, for records whose media may have to be fetched: of a few at once."""

        def finished(record: Record | DataError) -> tuple[list[Conversation], DataError | None]:
            found: list[Conversation] = []
            try:
                for conversation in self._made(record):
                    found.append(conversation)
            except DataError as e:
                return found, e
            return found, None

        waiting: deque[tuple[Record | DataError, Future[tuple[list[Conversation], DataError | None]]]] = deque()
        pool = ThreadPoolExecutor(AT_ONCE, "media")
        try:
            for record in chain(records, [None] * (2 * AT_ONCE)):
                if record is not None:
                    waiting.append((record, pool.submit(finished, record)))
                if waiting and (record is None or len(waiting) >= 2 * AT_ONCE):
                    first, future = waiting.popleft()
                    yield first, _again(*future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def of(self, record: Record) -> list[Conversation]:
        """All conversations of one record.

        Raises:
            DataError: one of them cannot be used, or there is none.
        """
        found = list(self._made(record))
        if not found:
            raise DataError("there is no sample in it", where=record.where, kind="missing-field")
        for conversation in found:
            check_conversation(conversation)
        return found

    def read(self) -> OpenSource:
        """The same without what is still to come: for reading single records."""
        return replace(self, head=[], remaining=iter(()), context=replace(self.context, folders=None))

    def one(self, record: Record, part: int) -> Conversation:
        """A conversation that `converted` gave, made again.

        Raises:
            DataError: its record, or a file that it names, is no longer what it was.
        """
        found = next(islice(self._made(record, check=False), part, None), None)
        if found is None:
            raise DataError("the sample is no longer there", where=record.where, kind="changed-file")
        return found

    def _made(self, record: Record | DataError, *, check: bool = True) -> Iterator[Conversation]:
        """A record's conversations, once it is seen that nothing of it is passed over that must not be."""
        if isinstance(record, DataError):
            raise record
        with errors_at(record.where):
            given = {k: v for k, v in record.fields.items() if k not in self.ignore}
            fields = Fields(
                self.columns.applied(given) if self.columns else given, self.ignore - self.columns.whole.keys()
            )
            for number, conversation in enumerate(conversations(record, fields, self.format, self.context)):
                if check and number == 0:
                    media, strict = len(conversation.pieces), self.context.strict
                    folder = self.context.media
                    check_unread(fields, format=self.format.name, strict=strict, media=media, folder=folder)
                yield repaired(conversation, self.repair, record.repaired)


def _again(found: list[Conversation], error: DataError | None) -> Iterator[Conversation]:
    yield from found
    if error is not None:
        raise error


@dataclass
class RecordSplit:
    """Which records of one file are wanted, where they name their splits themselves (a field `split`): as with files
    side by side, several are never read as one."""

    path: Path
    counts: bool
    wanted: str | None = None
    first: str | None = None

    def wants(self, record: Record) -> bool:
        """Whether the record is of the split that is wanted.

        Raises:
            DataError: it is of another split than those before it, and none is named.
        """
        own = known_split(record.fields.get("split")) if self.counts else None
        if own is None:
            if self.wanted not in (None, "train"):  # one file is what is trained on
                problem = f"hub_split names the split {self.wanted!r}, and the records of this one file name none"
                raise refused(self.path, problem, "leave hub_split out")
            return True
        if self.wanted is not None:
            return own in self.wanted.split("+")
        if self.first is None:
            self.first = own
        if own != self.first:
            raise refused(
                self.path, f"several splits lie side by side: {self.first}, {own} ({record.where})",
                f"name one with hub_split: {self.first}, several as {self.first}+{own}, or ignore: [split]",
            )  # fmt: skip
        return True
