"""From a data file to conversations: find out the format, convert each record, refuse or hand over the bad ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from opticnerve.data.readers.captions import CAPTION_FIELDS, captions
from opticnerve.data.readers.chat import chat
from opticnerve.data.readers.fields import AUDIO_FIELDS, IMAGE_FIELDS, Context
from opticnerve.data.readers.llava import llava
from opticnerve.data.readers.records import Record, records
from opticnerve.data.readers.rules import check_conversation
from opticnerve.data.readers.vqa import group_by_image as grouped
from opticnerve.data.readers.vqa import vqa
from opticnerve.data.video import MAX_COUNT
from opticnerve.types import Conversation, DataError

OnError = Callable[[DataError], None]
Convert = Callable[[Record, Context], Iterator[Conversation]]

_CONVERTERS: dict[str, Convert] = {"captions": captions, "vqa": vqa, "llava": llava, "chat": chat}
FORMATS = ("auto", *_CONVERTERS, "hf")
_LOOK_AHEAD = 32  # records in which a recognisable one is looked for


@dataclass(frozen=True)
class DataSource:
    """One entry of a recipe's `data:`. The fields are `read`'s arguments."""

    path: str | Path
    format: str = "auto"
    media: str | Path | None = None
    prompt: str | list[str] | None = None
    limit: int | None = None
    allow_outside_media: bool = False
    group_by_image: bool = False
    frames: int = 8

    def read(self, on_error: OnError | None = None) -> Iterator[Conversation]:
        return read(
            self.path,
            format=self.format,
            media=self.media,
            prompt=self.prompt,
            limit=self.limit,
            allow_outside_media=self.allow_outside_media,
            group_by_image=self.group_by_image,
            frames=self.frames,
            on_error=on_error,
        )


def read(
    path: str | Path,
    *,
    format: str = "auto",
    media: str | Path | None = None,
    prompt: str | list[str] | None = None,
    limit: int | None = None,
    allow_outside_media: bool = False,
    group_by_image: bool = False,
    frames: int = 8,
    on_error: OnError | None = None,
) -> Iterator[Conversation]:
    """The conversations of a data file, one after another; pictures are named, not opened.

    Args:
        path: a .json, .jsonl, .csv, .tsv or .parquet file, a folder saved by `datasets`, or a folder of Parquet files.
        format: `captions`, `vqa`, `llava` or `chat`; `hf`: a folder or Parquet file whose columns tell which of these;
            `auto`: the fields of the first recognisable record tell.
        media: the folder that pictures' paths start from; default: where the data file lies.
        prompt: captions only: what the user says beside the picture; of a list, one for each sample, fixed by its id.
        limit: stop after so many conversations.
        allow_outside_media: read files outside `media`, too. For data you trust.
        group_by_image: vqa only: all questions on a picture become one conversation.
        frames: how many pictures are taken of a video, at equal distances (chat and llava).
        on_error: gets each sample that cannot be used, and reading goes on; without it the first one is raised.

    Raises:
        DataError: a bad sample, without `on_error`. With it, still: a file that cannot be read at all, that holds no
            record, whose format cannot be told, or an argument that does not fit the format.
    """
    path = Path(path)
    if format not in FORMATS:
        raise _format_error(path, f"unknown format {format!r}", f"choose one of {', '.join(FORMATS)}")
    if limit is not None and limit < 0:
        raise _format_error(path, f"limit is {limit}", "give 0 or more")
    if not 0 < frames <= MAX_COUNT:
        raise _format_error(path, f"frames is {frames}", f"give 1 to {MAX_COUNT}")
    found = _found(path, format, media, prompt, allow_outside_media, group_by_image, frames, on_error or _raise)
    return islice(found, limit)


def read_all(sources: Iterable[DataSource], on_error: OnError | None = None) -> Iterator[Conversation]:
    """The conversations of several sources, one source after the other."""
    return chain.from_iterable(source.read(on_error) for source in sources)


def _found(
    path: Path,
    format: str,
    media: str | Path | None,
    prompt: str | list[str] | None,
    allow_outside_media: bool,
    group_by_image: bool,
    frames: int,
    on_error: OnError,
) -> Iterator[Conversation]:
    stream = records(path)
    if format == "hf" and not (path.is_dir() or path.suffix.lower() == ".parquet"):
        raise _format_error(path, "the hf format is a folder or a .parquet file", "leave format at auto")
    head = _head(stream)
    if format in ("auto", "hf"):
        format = _recognise(head, path, on_error)
    if prompt and format != "captions":
        raise _format_error(path, f"prompt is for captions, and this is {format}", "remove prompt")
    if group_by_image and format != "vqa":
        raise _format_error(path, f"group_by_image is for vqa, and this is {format}", "remove group_by_image")
    folder = Path(media) if media is not None else path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise DataError(f"the media folder {folder} does not exist", where=str(path), kind="missing-file")
    prompts = [prompt] if isinstance(prompt, str) else prompt or ()
    context = Context(path.stem, folder, allow_outside_media, prompts, frames)
    if not head:
        raise _empty(path)
    good = _converted(chain(head, stream), _CONVERTERS[format], context, on_error)
    yield from grouped(good) if group_by_image else good


def _converted(
    stream: Iterable[Record | DataError], convert: Convert, context: Context, on_error: OnError
) -> Iterator[Conversation]:
    for record in stream:
        if isinstance(record, DataError):
            on_error(record)
            continue
        made = convert(record, context)
        while True:
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
            yield conversation


def _head(stream: Iterator[Record | DataError]) -> list[Record | DataError]:
    """Enough of the beginning to tell the format by."""
    head: list[Record | DataError] = []
    for item in islice(stream, _LOOK_AHEAD):
        head.append(item)
        if isinstance(item, Record) and _matches(item):
            break
    return head


def _matches(record: Record) -> list[str]:
    """The formats whose fields the record has."""

    def has(*names: str) -> bool:
        return any(record.fields.get(n) is not None for n in names)

    fits = {
        "captions": has(*IMAGE_FIELDS, *AUDIO_FIELDS) and has(*CAPTION_FIELDS),
        "vqa": has("question") and has("answer", "answers"),
        "llava": has("conversations"),
        "chat": has("messages"),
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
        raise _format_error(
            path, f"the fields of {known[-1].where} fit several formats: {', '.join(matches)}", "set format to one"
        )
    for item in head:
        if isinstance(item, DataError):
            on_error(item)
    seen = ", ".join(str(k) for k in list(known[0].fields)[:12]) if known else "no readable record"
    raise _format_error(path, f"cannot tell the format from {seen}", f"set format to one of {', '.join(_CONVERTERS)}")


def _format_error(path: Path, problem: str, remedy: str) -> DataError:
    return DataError(problem, where=str(path), remedy=remedy, kind="format")


def _empty(path: Path) -> DataError:
    return DataError("there is no record in it", where=str(path), remedy="name another file", kind="empty-file")


def _raise(error: DataError) -> None:
    raise error
