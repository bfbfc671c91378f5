"""Taking values out of a record: by one of several names, of the type wanted, with pictures found in their folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from opticnerve.data.images import Frame, decode_data_url, is_url
from opticnerve.data.readers.records import Record
from opticnerve.data.video import spaced
from opticnerve.types import AudioPart, DataError, ImagePart

IMAGE_FIELDS = ("image", "image_path", "file_name", "filepath")
AUDIO_FIELDS = ("audio", "audio_path")
MOST_FOLDERS = 20_000
"""Folders of media that are remembered; where there are more, one more is."""


@dataclass(frozen=True)
class Context:
    """What holds for all records of a file.

    `name` begins the ids of records that have none. `media` is the folder in which pictures and sounds are looked for;
    a path that leads out of it is refused unless `allow_outside_media`, so that a data file from elsewhere cannot make
    us read whatever it names. `prompts`: what the user says to have a picture captioned. `frames`: pictures taken of a
    video. `folders`, if given, takes each folder in which a file was looked for, and when it had last changed
    (`folder_age`): as long as these stay, what was found is there and what was missing is not.
    """

    name: str
    media: Path
    allow_outside_media: bool = False
    prompts: Sequence[str] = ()
    frames: int = 8
    folders: dict[str, int] | None = None
    _root: Path = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_root", self.media.resolve())

    def id(self, record: Record) -> str:
        """The record's own id, else `<file's name>-<line or position>`."""
        own = record.fields.get("id")
        return f"{self.name}-{record.index}" if own is None or own == "" else str(own)

    def prompt(self, id: str) -> str | None:
        """One of the prompts, always the same for the same id."""
        return self.prompts[crc32(id.encode(errors="replace")) % len(self.prompts)] if self.prompts else None

    def images(self, value: Any, where: str) -> list[ImagePart]:
        """One picture or a list of them: path, `data:` URL, bytes, or datasets' `{"bytes": …, "path": …}`."""
        values = value if isinstance(value, list) else [value]
        return [ImagePart(self._medium(v, where, "image")) for v in values]

    def video(self, value: Any, where: str) -> list[ImagePart]:
        """A video's frames as pictures, not yet decoded: a file, a folder of pictures, bytes, or a list of pictures."""
        if isinstance(value, list):
            pictures = self.images(value, where)
            if not pictures:
                raise DataError("the video is an empty list of pictures", where=where, kind="wrong-type")
            return [pictures[index] for index in spaced(len(pictures), self.frames)]
        source = self._medium(value, where, "video")
        return [ImagePart(Frame(source, index, self.frames)) for index in range(self.frames)]  # type: ignore[arg-type]

    def media_of(self, record: Record) -> list[ImagePart] | list[AudioPart]:
        """What a record is about: its pictures, or the sound (or sounds) that it names instead."""
        if find(record, IMAGE_FIELDS) is None and (value := find(record, AUDIO_FIELDS)) is not None:
            return [self.audio(v, record.where) for v in (value if isinstance(value, list) else [value])]
        return self.images(take(record, IMAGE_FIELDS, "picture"), record.where)

    def audio(self, value: Any, where: str) -> AudioPart:
        return AudioPart(self._medium(value, where, "audio"))

    def _medium(self, value: Any, where: str, kind: str) -> Path | bytes:
        if isinstance(value, dict) and ("bytes" in value or "path" in value):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise DataError(
                f"the {kind} is given as {_brief(value)}", where=where, remedy="give a file's path", kind="wrong-type"
            )
        if is_url(value):
            raise DataError(
                f"the {kind} {value} is a web address, and opticnerve fetches nothing",
                where=where,
                remedy="download it and give the file's path",
                kind="url",
            )
        if value[:5].lower() == "data:":
            return decode_data_url(value, where=where)
        return self._file(value.removeprefix("file://"), where, kind)

    def _file(self, value: str, where: str, kind: str) -> Path:
        path = self.media / value
        if self.folders is not None and len(self.folders) <= MOST_FOLDERS:
            folder = os.path.dirname(path)
            if folder not in self.folders:
                self.folders[folder] = folder_age(folder)
        try:
            outside = not self.allow_outside_media and self._leads_out(path, kind)
            exists = path.exists()
        except (OSError, ValueError, RuntimeError) as e:  # a name too long, a zero byte, a loop of links
            raise DataError(
                f"the {kind} {value[:200]!r} is no usable path: {e}", where=where, kind=f"missing-{kind}"
            ) from e
        if outside:
            raise DataError(
                f"the {kind} {value} lies outside the media folder {self.media}",
                where=where,
                remedy="set media to the folder that holds it, or allow_outside_media: true if you trust this data",
                kind="outside-media",
            )
        if not exists:
            raise DataError(
                f"the {kind} {path} does not exist",
                where=where,
                remedy="set media to the folder that the paths start from",
                kind=f"missing-{kind}",
            )
        return path

    def _leads_out(self, path: Path, kind: str) -> bool:
        """A folder is a video of the pictures in it, and each of them may be a link of its own."""
        if not path.resolve().is_relative_to(self._root):
            return True
        inner = path.iterdir() if kind == "video" and path.is_dir() else ()
        return any(not picture.resolve().is_relative_to(self._root) for picture in inner)


def folder_age(folder: str) -> int:
    """When a folder was last changed, by its own clock (nanoseconds); -1 if there is none."""
    try:
        return os.stat(folder).st_mtime_ns
    except (OSError, ValueError):
        return -1


def take(record: Record, names: Sequence[str], what: str) -> Any:
    """The value under the first of `names` that the record has.

    Raises:
        DataError: it has none; the message lists the fields it has and the names wanted (kind `missing-field`).
    """
    value = find(record, names)
    if value is None:
        raise missing(record.fields, names, what, record.where)
    return value


def find(record: Record, names: Sequence[str]) -> Any:
    """The value under the first of `names` that is there and not null; else None."""
    return next((record.fields[n] for n in names if record.fields.get(n) is not None), None)


def missing(fields: dict[str, Any], names: Sequence[str], what: str, where: str) -> DataError:
    seen = ", ".join(str(n) for n in list(fields)[:12]) or "none"
    return DataError(
        f"no {what}: the fields here are {seen}",
        where=where,
        remedy=f"wanted {' or '.join(names)}",
        kind="missing-field",
    )


def text(value: Any, what: str, where: str) -> str:
    """A string; whole and decimal numbers are written out.

    Raises:
        DataError: anything else (kind `wrong-type`).
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"the {what} is not text but {_brief(value)}", where=where, kind="wrong-type")


def objects(value: Any, what: str, where: str) -> list[dict[str, Any]]:
    """A list of JSON objects.

    Raises:
        DataError: anything else (kind `wrong-type`).
    """
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise DataError(f"{what} is not a list of objects but {_brief(value)}", where=where, kind="wrong-type")
    return value


def _brief(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '…'}"
