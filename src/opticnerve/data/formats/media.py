"""From what a record says of its media to pictures, frames and sounds: found in their folder, not yet opened."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from opticnerve.data.formats.boxes import BoxOptions
from opticnerve.data.formats.fields import Fields, brief, empty
from opticnerve.data.formats.names import file_names, kind_by_name, kind_of, split, words_of
from opticnerve.data.media.cloud import in_cloud
from opticnerve.data.media.files import KINDS, Kind, base64_bytes, decode_data_url, is_url
from opticnerve.data.media.timeline import FrameSampling
from opticnerve.data.media.video import in_order, spaced
from opticnerve.data.media.web import fetched
from opticnerve.types import AudioPart, DataError, ImagePart, Part

MOST_FOLDERS = 20_000
"""Folders of media that are remembered; where there are more, one more is."""
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")
_SUFFIXES = (".jpg", ".png", ".jpeg", ".mp4", ".avi", ".webm", ".mkv", ".wav", ".mp3", ".flac")
_LONG = 64
# PNG, JPEG, GIF, WebP and WAV, BMP, TIFF, ICO, MP4, MP3, Ogg, FLAC
_BEGINNINGS = ("iVBORw", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkqA", "TU0AK", "AAAB", "AAAA", "SUQz", "//", "T2dnUw",
               "ZkxhQ")  # fmt: skip

Example = list[Part]
"""What stands in one place: a picture, the frames of a video, a sound."""


@dataclass(frozen=True)
class Context:
    """What holds for all records of a file.

    `name` begins the ids of records that have none. `media` is the folder in which pictures and sounds are looked for;
    a path that leads out of it is refused unless `allow_outside_media`, so that a data file from elsewhere cannot make
    us read whatever it names. `prompts`: what the user says to have a picture captioned. `frames`: pictures taken of a
    video, so many or in time. `strict`: the format was not named but told by the fields, so that words which it has no
    use for are an error. `folders`, if given, takes each folder in which a file was looked for, and when it had last
    changed (`folder_age`): as long as these stay, what was found is there and what was missing is not. `cache`: the
    folder into which what is named by a web address is fetched; without one nothing is; `private_hosts`: from within
    this network, too. `boxes`: how a record's `objects` are written where its words have tags for them. `address`: a
    folder in a cloud (`s3://…`), from which paths start instead of from `media`.
    """

    name: str
    media: Path
    allow_outside_media: bool = False
    prompts: Sequence[str] = ()
    frames: int | FrameSampling = 8
    strict: bool = False
    folders: dict[str, int] | None = None
    cache: Path | None = None
    private_hosts: bool = False
    boxes: BoxOptions | None = None
    address: str = ""
    _root: Path = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_root", self.media.resolve())

    def id(self, fields: Fields, index: int) -> str:
        """The record's own id, else `<file's name>-<line or position>`."""
        own = fields.get("id")
        return f"{self.name}-{index}" if empty(own) else str(own)

    def prompt(self, id: str) -> str | None:
        """One of the prompts, always the same for the same id."""
        return self.prompts[crc32(id.encode(errors="replace")) % len(self.prompts)] if self.prompts else None

    def media_of(self, fields: Fields) -> dict[Kind, list[Example]]:
        """What a record is about, by kind: its fields that name media by their own name.

        Raises:
            DataError: two fields name different ones (kind `unused-field`); or as `example`.
        """
        keys: dict[Kind, list[str]] = {kind: [] for kind in KINDS}
        for key, value in fields.raw():
            if kind_by_name(key) and (kind := kind_of(key, value)):
                keys[kind].append(key)
        found: dict[Kind, list[Example]] = {}
        for kind, names in keys.items():
            value = _joined(fields, names) if names else None
            if isinstance(value, dict) and all(any(not isinstance(p, str) for p in split(k)) for k in value):
                value = [value[k] for k in list(value)]  # MiniCPM-V's {"<image_00>": "1.jpg", …}
            if kind == "video" and isinstance(value, list) and len(value) > 1 and all(map(_is_still, value)):
                value = [value]  # the frames of one
            examples = value if isinstance(value, list) else [] if value is None else [value]
            found[kind] = [self.example(kind, v) for v in examples]
        return found

    def example(self, kind: Kind, value: object) -> Example:
        """One picture, one video's frames (not yet decoded) or one sound: a path, a `data:` URL, bytes, datasets'
        `{"bytes": …, "path": …}`; of a video also a folder of pictures or a list of them.

        Raises:
            DataError: no such file, one outside the media folder, a web address, or nothing that names a file.
        """
        if kind == "audio":
            return [AudioPart(self._medium(value, kind))]
        if kind == "image":
            return [ImagePart(self._medium(value, kind))]
        if isinstance(value, list):
            if not value:
                raise DataError("the video is an empty list of pictures", kind="wrong-type")
            if not isinstance(self.frames, int):
                problem = f"the video is a list of {len(value)} pictures, which have no times"
                raise DataError(problem, remedy="give frames as a number", kind="unreadable-video")
            pictures = [ImagePart(self._medium(v, "image")) for v in value]
            return [pictures[index] for index in spaced(len(pictures), self.frames)]
        return [*in_order(self._medium(value, kind), self.frames)]

    def _medium(self, value: object, kind: Kind) -> Path | bytes:
        if isinstance(value, dict):
            value = next((value[k] for k in ("bytes", "path", "url", "data") if value.get(k) is not None), value)
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise DataError(f"the {kind} is given as {brief(value)}", remedy="give a file's path", kind="wrong-type")
        if is_url(value) or in_cloud(value):
            return self._fetched(value, kind)
        if value[:5].lower() == "data:":
            return decode_data_url(value, kind)
        if len(value) >= _LONG and value.lstrip().startswith(_BEGINNINGS) and _BASE64.fullmatch(value):
            return base64_bytes(value, kind, f"the {kind} of {len(value):,} characters that look like base64")
        value = value.removeprefix("file://")
        if not self.address:
            return self._file(value, kind)
        if value.startswith("/") or ".." in value.split("/"):
            raise self._outside(value, self.address, kind)
        return self._fetched(f"{self.address.rstrip('/')}/{value.removeprefix('./')}", kind)

    def _fetched(self, address: str, kind: Kind) -> Path:
        if self.cache is None:
            raise DataError(
                f"the {kind} {address[:200]} is a web address, and opticnerve fetches nothing unasked",
                remedy="name a folder to fetch it into with media_cache, or download it and give the file's path",
                kind="url",
            )  # fmt: skip
        return fetched(address, self.cache, kind, private=self.private_hosts)

    def _file(self, value: str, kind: Kind) -> Path:
        path = self.media / value
        if self.folders is not None and len(self.folders) <= MOST_FOLDERS:
            folder = os.path.dirname(path)
            if folder not in self.folders:
                self.folders[folder] = folder_age(folder)
        try:
            outside = not self.allow_outside_media and self._leads_out(path, kind)
            exists = path.exists()
        except (OSError, ValueError, RuntimeError) as e:  # a name too long, a zero byte, a loop of links
            raise DataError(f"the {kind} {value[:200]!r} is no usable path: {e}", kind=f"missing-{kind}") from e
        if outside:
            raise self._outside(value, self.media, kind)
        if not exists:
            remedy = "set media to the folder that the paths start from"
            if not path.suffix and (end := next((s for s in _SUFFIXES if path.with_suffix(s).exists()), None)):
                remedy = f'there is {value[:60]}{end}: columns.{kind}="{{{kind}}}{end}"'
            raise DataError(f"the {kind} {path} does not exist", remedy=remedy, kind=f"missing-{kind}")
        return path

    def _outside(self, value: str, folder: Path | str, kind: str) -> DataError:
        problem = f"the {kind} {value} lies outside the media folder {folder}"
        remedy = "set media to the folder that holds it, or allow_outside_media: true if you trust this data"
        return DataError(problem, remedy=remedy, kind="outside-media")

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


def _says_whence(value: object) -> bool:
    return isinstance(value, str) and is_url(value)


def _is_bytes(value: object) -> bool:
    return isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))


def _is_still(value: object) -> bool:
    return isinstance(value, str) and value.lower().endswith((".jpg", ".jpeg", ".png", ".bmp"))


def _joined(fields: Fields, keys: list[str]) -> Any:
    """The value of the fields that name media of one kind: of one, of several that name the same, or of numbered ones
    (`image_1`, `image_2`) as a list."""
    numbers = [[w for w in words_of(k) if w.isdigit()] for k in keys]
    stems = {tuple(w for w in words_of(k) if not w.isdigit()) for k in keys}
    if len(keys) > 1 and len(stems) == 1 and all(numbers):
        return [fields[k] for k in sorted(keys, key=lambda k: [int(w) for w in words_of(k) if w.isdigit()])]
    if len(local := [k for k in keys if not _says_whence(dict.get(fields, k))]) not in (0, len(keys)):
        keys = local  # a web address beside a file says where that came from
    first, *others = sorted(keys, key=lambda k: (kind_by_name(k) == "file", not _is_bytes(dict.get(fields, k))))
    value = fields[first]
    for key in others:
        if _is_bytes(value) and isinstance(fields[key], str):
            continue  # with the picture at hand, a path says where it came from
        if not same_files(value, dict(fields.raw())[key]):
            raise DataError(
                f"{first} and {key} both name media, and different ones",
                remedy=f"join them in one list, or pass one over with ignore: [{key}]", kind="unused-field",
            )  # fmt: skip
        # With bytes at hand nothing is looked for.
        held = fields[key]
        value = held if isinstance(held, dict) and not isinstance(held.get("bytes"), type(None)) else value
    return value


def same_files(one: object, other: object) -> bool:
    """Whether two values name the same files: paths of which one is the other's end."""
    left, right = list(file_names(one)), list(file_names(other))
    return len(left) == len(right) > 0 and all(ends_alike(a, b) for a, b in zip(left, right, strict=True))


def ends_alike(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether one path is the other's end."""
    shared = min(len(a), len(b))
    return shared > 0 and a[-shared:] == b[-shared:]
