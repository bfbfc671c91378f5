"""From a data file to conversations: find out the format, convert each record, refuse or hand over the bad ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from opticnerve.data.formats.converters import CAPTION_FIELDS, CONVERTERS, VAGUE_FIELDS, company, conversations
from opticnerve.data.formats.converters import group_by_image as grouped
from opticnerve.data.formats.fields import Fields
from opticnerve.data.formats.media import Context
from opticnerve.data.formats.names import kind_by_name, kind_of
from opticnerve.data.formats.rules import REPAIRS, check_conversation, check_unread, repaired
from opticnerve.data.media.files import errors_at
from opticnerve.data.media.video import MAX_COUNT
from opticnerve.data.sources.base import Record, Records, Streaming, refused
from opticnerve.data.sources.open import open_records
from opticnerve.data.sources.streaming import Streamed, is_hub_name
from opticnerve.types import Conversation, DataError

OnError = Callable[[DataError], None]

FORMATS = ("auto", *CONVERTERS, "hf", "webdataset")
_BY_FIELDS = ("auto", "hf", "webdataset")  # the fields of the records tell which of the converters is meant
_HEAD = 32  # records in which a recognisable one is looked for


@dataclass(frozen=True)
class DataSource:
    """One entry of a recipe's `data:`.

    `path`: a .json, .jsonl, .csv, .tsv or .parquet file, a folder saved by `datasets`, a folder of Parquet files, or
    webdataset shards (`shards/{000..099}.tar`). `format`: `captions`, `vqa`, `llava`, `chat`, `completion` or
    `preference`; `hf`: a folder or Parquet file whose columns tell which of these; `webdataset`: shards, whose samples
    tell; `auto`: the fields of the first recognisable record tell. `media`: the folder that pictures' paths start from;
    default: where the data file lies. `prompt`: captions only: what the user says beside the picture; of a list, one
    for each sample, fixed by its id. `limit`: stop after so many conversations. `allow_outside_media`: read files
    outside `media`, too, for data you trust. `group_by_image`: vqa only: all questions on a picture become one
    conversation. `frames`: how many pictures are taken of a video, at equal distances (chat and llava). `ignore`:
    fields of the records that are passed over, although they name media or say what is learned. `split`: of a folder
    with several splits, the one that is meant. `repair`: repairs to make, by name (`formats.rules`).
    """

    path: str | Path
    format: str = "auto"
    media: str | Path | None = None
    prompt: str | list[str] | None = None
    limit: int | None = None
    allow_outside_media: bool = False
    group_by_image: bool = False
    frames: int = 8
    stream: Streaming | None = None
    ignore: Sequence[str] = ()
    split: str | None = None
    repair: Sequence[str] = ()

    def read(self, on_error: OnError | None = None) -> Iterator[Conversation]:
        self.check()
        return islice(self._found(raise_error if on_error is None else on_error), self.limit)

    def _found(self, on_error: OnError) -> Iterator[Conversation]:
        opened = open_source(self, on_error)
        good = (conversation for _, _, conversation in opened.converted(on_error))
        yield from grouped(good) if self.group_by_image else good

    def check(self) -> None:
        """Refuse what no file could make right."""
        path = Path(self.path)
        if self.format not in FORMATS:
            raise refused(path, f"unknown format {self.format!r}", f"choose one of {', '.join(FORMATS)}")
        if self.limit is not None and self.limit < 0:
            raise refused(path, f"limit is {self.limit}", "give 0 or more")
        if unknown := sorted(set(self.repair) - set(REPAIRS)):
            raise refused(path, f"unknown repair {unknown[0]!r}", f"choose of {', '.join(REPAIRS)}")
        if not 0 < self.frames <= MAX_COUNT:
            raise refused(path, f"frames is {self.frames}", f"give 1 to {MAX_COUNT}")


@dataclass
class OpenSource:
    """A source whose format is known: its records, and what makes conversations of them."""

    records: Records
    format: str
    context: Context
    ignore: frozenset[str]
    repair: Sequence[str]
    head: list[Record | DataError]
    remaining: Iterator[Record | DataError]

    def converted(self, on_error: OnError) -> Iterator[tuple[Record, int, Conversation]]:
        """All good conversations, once: the record of each, and which of that record's it is."""
        for record in chain(self.head, self.remaining):
            if isinstance(record, DataError):
                on_error(record)
                continue
            made = self._made(record)
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
                yield record, part, conversation

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
        return replace(self, head=[], remaining=iter(()))

    def one(self, record: Record, part: int) -> Conversation:
        """A conversation that `converted` gave, made again.

        Raises:
            DataError: its record, or a file that it names, is no longer what it was.
        """
        found = next(islice(self._made(record, check=False), part, None), None)
        if found is None:
            raise DataError("the sample is no longer there", where=record.where, kind="changed-file")
        return found

    def _made(self, record: Record, *, check: bool = True) -> Iterator[Conversation]:
        """A record's conversations, once it is seen that nothing of it is passed over that must not be."""
        fields = Fields(record.fields, self.ignore)
        with errors_at(record.where):
            for number, conversation in enumerate(conversations(record, fields, self.format, self.context)):
                if check and number == 0:
                    media, strict = len(conversation.pieces), self.context.strict
                    check_unread(fields, format=self.format, strict=strict, media=media)
                yield repaired(conversation, self.repair)


def open_source(source: DataSource, on_error: OnError, *, folders: dict[str, int] | None = None) -> OpenSource:
    """Open a source and find out its format.

    Args:
        folders: takes the folders in which media are looked for, see `fields.Context`.

    Raises:
        DataError: as `read` does even with `on_error`.
    """
    path, format = Path(source.path), source.format
    found = (
        Streamed(source.path, source.stream) if source.stream is not None else open_records(path, format, source.split)
    )
    known = path.is_dir() or path.suffix.lower() == ".parquet" or source.stream is not None
    if format == "hf" and not known:
        raise refused(path, "the hf format is a folder or a .parquet file", "leave format at auto")
    rest = iter(found)
    head = _head(rest)
    if format in _BY_FIELDS:
        format = _recognise(head, path, on_error)
    if source.prompt and format != "captions":
        raise refused(path, f"prompt is for captions, and this is {format}", "remove prompt")
    if source.group_by_image and format != "vqa":
        raise refused(path, f"group_by_image is for vqa, and this is {format}", "remove group_by_image")
    media = Path(source.media) if source.media is not None else path if path.is_dir() else path.parent
    on_hub = source.stream is not None and source.media is None and not path.exists() and is_hub_name(str(source.path))
    if on_hub:
        media = path  # pictures come with the rows: a name in them reaches nothing on this machine
    elif not media.is_dir():
        raise DataError(f"the media folder {media} does not exist", where=str(path), kind="missing-file")
    if not head:
        raise _empty(path)
    prompts = [source.prompt] if isinstance(source.prompt, str) else source.prompt or ()
    strict = source.format in _BY_FIELDS
    context = Context(path.stem, media, source.allow_outside_media, prompts, source.frames, strict, folders)
    return OpenSource(found, format, context, frozenset(source.ignore), source.repair, head, rest)


def read(path: str | Path, *, on_error: OnError | None = None, **options: Any) -> Iterator[Conversation]:
    """The conversations of a data file, one after another; pictures are named, not opened.

    Args:
        path, options: the fields of `DataSource`.
        on_error: gets each sample that cannot be used, and reading goes on; without it the first one is raised.

    Raises:
        DataError: a bad sample, without `on_error`. With it, still: a file that cannot be read at all, that holds no
            record, whose format cannot be told, or an argument that does not fit the format.
    """
    return DataSource(path, **options).read(on_error)


def _head(stream: Iterator[Record | DataError]) -> list[Record | DataError]:
    """Enough of the beginning to tell the format by."""
    head: list[Record | DataError] = []
    for item in islice(stream, _HEAD):
        head.append(item)
        if isinstance(item, Record) and _matches(item):
            break
    return head


def _matches(record: Record) -> list[str]:
    """The formats whose fields the record has."""

    fields = record.fields

    def has(*names: str) -> bool:
        return any(fields.get(n) is not None for n in names)

    about = any(kind_by_name(k) and kind_of(k, v) for k, v in fields.items() if isinstance(k, str))
    fits = {
        "captions": about and (has(*CAPTION_FIELDS) or (has(*VAGUE_FIELDS) and company(fields) is None)),
        "vqa": has("question") and has("answer", "answers"),
        "llava": has("conversations"),
        "chat": has("messages"),
        "completion": has("prompt") and has("completion"),
        "preference": has("chosen") and has("rejected"),
    }
    return [name for name, fit in fits.items() if fit]


def _recognise(head: list[Record | DataError], path: Path, on_error: OnError) -> str:
    if not head:
        raise _empty(path)
    known = [item for item in head if isinstance(item, Record)]
    matches = _matches(known[-1]) if known else []
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise refused(
            path, f"the fields of {known[-1].where} fit several formats: {', '.join(matches)}", "set format to one"
        )
    for item in head:
        if isinstance(item, DataError):
            on_error(item)
    seen = ", ".join(str(k) for k in list(known[0].fields)[:12]) if known else "no readable record"
    raise refused(path, f"cannot tell the format from {seen}", f"set format to one of {', '.join(CONVERTERS)}")


def _empty(path: Path) -> DataError:
    return refused(path, "there is no record in it", "name another file", "empty-file")


def raise_error(error: DataError) -> None:
    raise error
