"""From a data file to conversations: find out the format, convert each record, refuse or hand over the bad ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from opticnerve.data.dataset.opened import OnError, OpenSource, RecordSplit
from opticnerve.data.formats.base import DataFormat
from opticnerve.data.formats.boxes import BoxOptions
from opticnerve.data.formats.columns import Columns, Source
from opticnerve.data.formats.converters import format_of
from opticnerve.data.formats.converters import group_by_image as grouped
from opticnerve.data.formats.layouts import as_option, guessed, layout_of
from opticnerve.data.formats.media import Context
from opticnerve.data.formats.rules import REPAIRS
from opticnerve.data.formats.turns import ROLES
from opticnerve.data.formats.where import Where
from opticnerve.data.media.cloud import in_cloud
from opticnerve.data.media.timeline import MAX_COUNT, FrameSampling
from opticnerve.data.sources.base import Record, Records, Streaming, refused
from opticnerve.data.sources.joined import Annotated
from opticnerve.data.sources.open import open_records
from opticnerve.data.sources.streaming import Streamed, is_hub_name
from opticnerve.registry import data_formats, hint_at, known_formats
from opticnerve.types import Conversation, DataError

_BY_FIELDS = ("auto", "hf", "webdataset")  # the fields of the records tell which of the formats is meant
FORMATS = known_formats()
_HEAD = 32  # records in which a recognisable one is looked for


@dataclass(frozen=True)
class DataSource:
    """One entry of a recipe's `data:`.

    `path`: a data file, a folder of them or one saved by `datasets`, or webdataset shards (`shards/{000..099}.tar`).
    `format`: one of `registry.data_formats`; `hf`: a folder or Parquet file whose columns tell which of these;
    `webdataset`: shards, whose samples tell; `auto`: the fields of the first recognisable record tell. `media`: the
    folder that pictures' paths start from; default: where the data file lies. `prompt`: captions only: what the user
    says beside the picture; of a list, one for each sample, fixed by its id. `limit`: stop after so many conversations.
    `allow_outside_media`: read files outside `media`, too, for data you trust. `group_by_image`: vqa only: all
    questions on a picture become one conversation. `frames`: how many pictures are taken of a video, at equal
    distances, or how many a second. `ignore`: fields of the records that are passed over, although they name media or
    say what is learned. `split`: which of several splits is meant. `repair`: repairs to make, by name
    (`formats.rules`). `columns`, `roles`: names of the format's to those of the file (`formats.columns`).
    `annotations`: a second file, whose records belong to those of the first (`sources.joined`). `media_cache`: the
    folder into which pictures on the web are fetched. `allow_private_hosts`: from hosts within this network, too.
    `where`: a condition that wanted records meet (`formats.where`). `boxes`: how the `objects` of a record are written
    (`formats.boxes`).
    """

    path: str | Path
    format: str = "auto"
    media: str | Path | None = None
    prompt: str | list[str] | None = None
    limit: int | None = None
    allow_outside_media: bool = False
    group_by_image: bool = False
    frames: int | FrameSampling = 8
    stream: Streaming | None = None
    ignore: Sequence[str] = ()
    split: str | None = None
    repair: Sequence[str] = ()
    columns: Mapping[str, Source] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    annotations: str | Path | None = None
    media_cache: str | Path | None = None
    where: str | None = None
    allow_private_hosts: bool = False
    boxes: BoxOptions | None = None

    def records(self) -> Records:
        """The records of the file, or files, as they lie there.

        Raises:
            DataError: it cannot be read at all.
        """
        if self.stream is not None:
            if self.annotations is not None:
                problem = "annotations join what lies anywhere in two files"
                raise refused(self.path, problem, "leave streaming out", "format")
            return Streamed(self.path, self.stream)
        split = None if Path(self.path).is_file() else self.split  # of one file, its records say
        found = open_records(Path(self.path), self.format, split, close_quotes="close-quotes" in self.repair)
        if self.annotations is None:
            return found
        return Annotated(found, open_records(Path(self.annotations)))

    def read(
        self, on_error: OnError | None = None, *, left_out: Counter[str] | None = None
    ) -> Iterator[Conversation]:  # fmt: skip
        """The conversations, one after another. `left_out` counts the records that `where` leaves out, under it."""
        self.check()
        return islice(self._found(raise_error if on_error is None else on_error, left_out), self.limit)

    def _found(self, on_error: OnError, left_out: Counter[str] | None) -> Iterator[Conversation]:
        opened = open_source(self, on_error)
        good = (conversation for _, _, conversation in opened.converted(on_error, left_out))
        yield from grouped(good) if self.group_by_image else good

    def check(self) -> None:
        """Refuse what no file could make right."""
        path = Path(self.path)
        if self.format not in (known := known_formats()):
            raise refused(path, f"unknown format {self.format!r}", f"choose one of {', '.join(known)}")
        if self.limit is not None and self.limit < 0:
            raise refused(path, f"limit is {self.limit}", "give 0 or more")
        if unknown := sorted(set(self.repair) - set(REPAIRS)):
            raise refused(path, f"unknown repair {unknown[0]!r}", f"choose of {', '.join(REPAIRS)}")
        if strange := next((r for r in self.roles.values() if r not in ROLES), None):
            raise refused(
                path, f"roles: {strange!r} is no role", "map to user, assistant, system or tool", "unknown-role"
            )
        if isinstance(self.frames, int) and not 0 < self.frames <= MAX_COUNT:
            raise refused(path, f"frames is {self.frames}", f"give 1 to {MAX_COUNT}")
        if self.where is not None:
            Where(self.where)


def open_source(
    source: DataSource, on_error: OnError, *, folders: dict[str, int] | None = None, records: Records | None = None
) -> OpenSource:
    """Open a source and find out its format.

    Args:
        folders: takes the folders in which media are looked for, see `media.Context`. records: the source's, where
            they have been opened already.

    Raises:
        DataError: as `read` does even with `on_error`.
    """
    path = Path(source.path)
    found = source.records() if records is None else records
    known = path.is_dir() or path.suffix.lower() == ".parquet" or source.stream is not None
    if source.format == "hf" and not known:
        raise refused(path, "the hf format is a folder or a .parquet file", "leave format at auto")
    rest = iter(found)
    columns = Columns(source.columns, source.roles)
    media = _media_of(source, path)
    ignore = frozenset(source.ignore)
    head = _head(rest, columns, ignore)
    if columns:
        _while(lambda: columns.missing([r.fields for r in head if isinstance(r, Record)]), head, rest)
    read_by, columns, again = _shape(source, head, columns, media, on_error)
    where = _condition(source, head, rest, columns)
    if source.prompt and not read_by.takes_prompt:
        raise refused(path, f"prompt is for captions, and this is {read_by.name}", "remove prompt")
    if source.group_by_image and read_by.name != "vqa":
        raise refused(path, f"group_by_image is for vqa, and this is {read_by.name}", "remove group_by_image")
    if not head:
        raise _empty(path)
    prompts = [source.prompt] if isinstance(source.prompt, str) else source.prompt or ()
    strict = source.format in _BY_FIELDS
    cache = Path(source.media_cache) if source.media_cache is not None else None
    context = Context(
        path.stem, media, source.allow_outside_media, prompts, source.frames, strict, folders, cache,
        source.allow_private_hosts, source.boxes, str(source.media) if in_cloud(source.media) else "",
    )  # fmt: skip
    counts = "split" not in source.ignore and source.stream is None
    split = RecordSplit(path, counts, source.split if path.is_file() else None)
    return OpenSource(found, read_by, columns, context, ignore.union(again), source.repair, head, rest, split, where)


def _media_of(source: DataSource, path: Path) -> Path:
    if in_cloud(source.media):
        return path  # nothing is looked for on this machine
    media = Path(source.media) if source.media is not None else path if path.is_dir() else path.parent
    on_hub = source.stream is not None and source.media is None and not path.exists() and is_hub_name(str(source.path))
    if on_hub:
        return path  # pictures come with the rows: a name in them reaches nothing on this machine
    if not media.is_dir():
        raise refused(
            path, f"the media folder {media} does not exist", "name the folder of the pictures", "missing-file"
        )
    return media


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


def _head(stream: Iterator[Record | DataError], columns: Columns, ignore: frozenset[str]) -> list[Record | DataError]:
    """Enough of the beginning to tell the format by."""
    head: list[Record | DataError] = []
    for item in islice(stream, _HEAD):
        head.append(item)
        if isinstance(item, Record) and (_matches(mapped := _mapped(item, columns, ignore)) or layout_of(mapped)):
            break
    return head


def _while(lacking: Callable[[], object], head: list[Record | DataError], rest: Iterator[Record | DataError]) -> None:
    """Take more of the rest into the head: a field that is asked for may stand in a later record alone."""
    while len(head) < _HEAD and lacking() and (item := next(rest, None)) is not None:
        head.append(item)


def _condition(
    source: DataSource, head: list[Record | DataError], rest: Iterator[Record | DataError], columns: Columns
) -> Where | None:
    """What `where` says.

    Raises:
        DataError: none of the first records has a field that it names.
    """
    if source.where is None:
        return None
    where = Where(source.where)

    def mapped() -> list[tuple[dict[str, Any], dict[str, Any]]]:
        return [(item.fields, _mapped(item, columns, ())) for item in head if isinstance(item, Record)]

    _while(lambda: where.missing(mapped()), head, rest)
    if (first := mapped()) and (lost := where.missing(first)):
        there = list(dict.fromkeys(str(k) for pair in first for fields in pair for k in fields))
        problem = f"where: no record has {lost}; the fields of the first {len(first)} are {', '.join(there[:24])}"
        remedy = "correct the condition" + hint_at(lost, there)
        raise refused(Path(source.path), problem, remedy, "missing-field")
    return where


def _mapped(record: Record, columns: Columns, ignore: Iterable[str]) -> dict[str, Any]:
    fields = {k: v for k, v in record.fields.items() if k not in ignore}
    try:
        return columns.applied(fields) if columns else fields
    except DataError:  # told when its turn comes
        return fields


def _matches(record: dict[str, Any]) -> list[str]:
    """The formats whose fields the record has."""
    return [name for name in data_formats if format_of(name).fits(record)]


def _shape(
    source: DataSource, head: list[Record | DataError], columns: Columns, media: Path, on_error: OnError
) -> tuple[DataFormat, Columns, Sequence[str]]:
    """What reads the records; the map that leads there, the user's or that of a known layout; and what the layout
    passes over."""
    path, known = Path(source.path), [item for item in head if isinstance(item, Record)]
    if columns and known and (lost := columns.missing([r.fields for r in known])):
        name, field = lost
        there = ", ".join(str(k) for k in list(known[0].fields)[:12])
        problem = f"columns.{name}: no record has {field}; the fields of {known[0].where} are {there}"
        raise refused(path, problem, "correct the map" + hint_at(field, map(str, known[0].fields)), "missing-field")
    mapped = [_mapped(r, columns, source.ignore) for r in known]
    record = next((m for m in mapped if _matches(m) or layout_of(m)), mapped[-1] if mapped else {})
    wanted = None if source.format in _BY_FIELDS else source.format
    if not columns and (layout := layout_of(record, wanted)):
        return format_of(layout.format), layout.map, layout.ignore
    if wanted is not None:
        return format_of(wanted), columns, ()
    return format_of(_recognise(_matches(record), record, source, head, media, on_error)), columns, ()


def _recognise(
    matches: list[str], record: dict[str, Any], source: DataSource, head: list[Record | DataError], media: Path,
    on_error: OnError,
) -> str:  # fmt: skip
    path = Path(source.path)
    if not head:
        raise _empty(path)
    known = [item for item in head if isinstance(item, Record)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise refused(
            path, f"the fields of {known[-1].where} fit several formats: {', '.join(matches)}", "set format to one"
        )
    for item in head:
        if isinstance(item, DataError):
            on_error(item)
    names = ", ".join(str(k) for k in list(record)[:12]) if known else "no readable record"
    wants = "; ".join(f"{name}: {format_of(name).wants}" for name in data_formats)
    columns = guessed(record, media)
    remedy = f"this would probably fit: {as_option(columns)}" if columns else "say with columns what is what"
    if "question" in record and source.annotations is None:
        remedy = f"where another file has the answers, name it with annotations; or {remedy}"
    raise refused(path, f"cannot tell the format from {names}. A record wants, for {wants}", remedy)


def _empty(path: Path) -> DataError:
    return refused(path, "there is no record in it", "name another file", "empty-file")


def raise_error(error: DataError) -> None:
    raise error
