"""Which fields and tags of a record name media.

A field does so by its name alone (`image`, `img_path`, `videoFile`, `audio_url_2`: words for media and for files, and
no other word), or, whatever it is called, by a value that can be nothing else: a file's name that ends as media do, a
`data:` URL of one, `datasets`' `{"bytes": …}`. A tag stands in the words: `<image>`, `<|video_pad|>`, `[IMG]`,
`<img>1.png</img>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from opticnerve.data.formats.fields import empty
from opticnerve.data.media.files import KINDS, Kind

_NOUNS: dict[Kind, tuple[str, ...]] = {
    "image": ("image", "img", "picture", "pic", "photo", "photograph", "screenshot"),
    "video": ("video", "vid", "movie"),
    "audio": ("audio", "sound", "speech", "wav"),
}
_KIND_OF: dict[str, Kind] = {
    form: kind for kind, nouns in _NOUNS.items() for noun in nouns for form in (noun, f"{noun}s")
}
_HOLDERS = {
    "path", "paths", "file", "files", "filename", "filenames", "filepath", "filepaths", "name", "names", "url", "urls",
    "uri", "uris", "src", "link", "links", "bytes", "data", "base64", "b64", "list", "local",
}  # fmt: skip
_FILE_KEYS = {("file", "name"), ("file", "names"), ("file", "path"), ("file", "paths"), ("filename",), ("filenames",),
              ("filepath",), ("filepaths",)}  # fmt: skip
_ENDINGS: dict[Kind, str] = {
    "image": "jpg jpeg jpe jfif png webp gif bmp tif tiff avif heic heif jp2 ppm pgm ico",
    "video": "mp4 mov mkv webm avi mpg mpeg m4v flv ogv wmv",
    "audio": "wav flac mp3 ogg opus m4a aac wma",
}
_KIND_OF_ENDING: dict[str, Kind] = {e: kind for kind, endings in _ENDINGS.items() for e in endings.split()}
_NAME = re.compile(r"[^\r\n]*?\.([A-Za-z0-9]{2,4})(?:[?#][^\r\n]*)?")
_DATA_URL = re.compile(r"data:(image|video|audio)/", re.IGNORECASE)
_LONGEST_NAME = 4_096


@lru_cache(maxsize=4_096)
def words_of(key: str) -> tuple[str, ...]:
    """`imageURL_2` → image, url, 2."""
    return tuple(w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", key))


@lru_cache(maxsize=4_096)
def kind_by_name(key: str) -> Kind | Literal["file"] | None:
    """What media a field of this name holds; `file`: some, which its value tells."""
    words = words_of(key)
    kinds = {_KIND_OF[w] for w in words if w in _KIND_OF}
    if len(kinds) == 1 and all(w in _KIND_OF or w in _HOLDERS or w.isdigit() for w in words):
        return kinds.pop()
    return "file" if words in _FILE_KEYS else None


def names_by_number(key: str) -> bool:
    """Whether a field may point at media by a number of theirs (`image_id`)."""
    words = words_of(key)
    return any(w in _KIND_OF for w in words) and words[-1:] in (("id",), ("ids",), ("index",))


def kind_by_value(value: object, depth: int = 0) -> Kind | None:
    """What media a value is or names, where it can be nothing else."""
    if isinstance(value, str) and len(value) > 4:
        if found := _DATA_URL.match(value):
            return found[1].lower()  # type: ignore[return-value]
        if len(value) <= _LONGEST_NAME and (name := _NAME.fullmatch(value.strip())):
            return _KIND_OF_ENDING.get(name[1].lower())
    elif isinstance(value, bytes):
        return "image" if value[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xe1", b"GIF8") else None
    elif isinstance(value, dict) and value.keys() <= {"bytes", "path"} and not empty(value):
        return kind_by_value(value.get("path"), depth) or "image"
    elif isinstance(value, list) and depth < 3:
        return next((kind for v in value[:64] if (kind := kind_by_value(v, depth + 1))), None)
    return None


def kind_of(key: str, value: object) -> Kind | None:
    """What media the field names: by its name and a value that may name some, or by its value alone."""
    if empty(value) or isinstance(value, bool | int | float):
        return None
    by_name = kind_by_name(key)
    if by_name in KINDS:
        return by_name
    return kind_by_value(value) or ("image" if by_name == "file" and isinstance(value, str) else None)


def file_names(value: object) -> Iterator[tuple[str, ...]]:
    """The files that a value names, each as the parts of its path."""
    if isinstance(value, str) and len(value) <= _LONGEST_NAME and not value.startswith("data:"):
        yield tuple(p for p in re.split(r"[/\\]+", re.sub(r"[?#].*$", "", value.strip())) if p not in ("", "."))
    elif isinstance(value, dict):
        yield from file_names(value.get("path") or value.get("url"))
    elif isinstance(value, list):
        for v in value:
            yield from file_names(v)


# -- tags in the words ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tag:
    """A place in the words where media belong. `path`: the file that it names; `number`: which of the record's."""

    kind: Kind
    text: str
    number: int | None = None
    path: str | None = None


_ALL = "|".join(
    noun for nouns in _NOUNS.values() for noun in nouns if noun not in ("movie", "screenshot", "photograph")
)
_AROUND = "<fake_token_around_image>"
_MEDIA = "(?:image|img|video|audio)"
_OPEN = rf"<\|(?:vision_start|(?:begin|start)_of_{_MEDIA}|{_MEDIA}_(?:start|bos))\|>|<im_start>"
_CLOSE = rf"<\|(?:vision_end|end_of_{_MEDIA}|{_MEDIA}_(?:end|eos))\|>|<im_end>"
_BARE = (
    rf"<\|?(?:start_of_)?(?P<noun>{_ALL})s?[_\- ]?(?P<number>\d+)?"
    r"(?:[_ ]?(?:pad|token|soft_token|placeholder|here|content|context))?\s*(?:\|>|/?>)"
)
_PLAIN = re.sub(r"\?P<\w+>", "?:", _BARE)
_TAG = re.compile(
    rf"(?P<wrapped>(?:{_OPEN}|{_AROUND})\s*(?:{_PLAIN}\s*)+(?:{_CLOSE}|{_AROUND}))"
    rf"|<(?P<paired>{_ALL})>(?P<inner>(?:[^<>\n]|{_PLAIN})*)</(?P=paired)>"
    r"""|<img\s[^<>]*?\bsrc\s*=\s*["']?(?P<src>(?!https?:)[^"'\s<>]+)["']?[^<>]*>"""
    rf"|{_BARE}"
    rf"|{_OPEN}|{_CLOSE}|{_AROUND}"
    r"|\[(?-i:(?P<upper>IMG|IMAGE|VIDEO|AUDIO))[_ ]?(?P<place>\d+)?\]",
    re.IGNORECASE,
)


def split(words: str) -> list[str | Tag]:
    """The words and the tags in them, in order. The line break behind a tag goes with it: the template writes it."""
    if "<" not in words and "[" not in words:
        return [words] if words else []
    pieces: list[str | Tag] = []
    at = 0
    for found in _TAG.finditer(words):
        if found.start() > at:
            pieces.append(words[at : found.start()])
        pieces.append(_tag(found))
        at = found.end() + (words[found.end() : found.end() + 1] == "\n")
    if at < len(words):
        pieces.append(words[at:])
    return pieces


def first_tag(words: str) -> str | None:
    """The first tag in some words that are to have none."""
    if "<" not in words and "[" not in words:
        return None
    found = _TAG.search(words)
    return found[0] if found else None


def _tag(found: re.Match[str]) -> Tag:
    whole = found[0]
    if found["src"]:
        return Tag("image", whole, path=found["src"])
    number = found["number"] or found["place"]
    noun = found["noun"] or found["paired"] or found["upper"] or ""
    spelled: Kind = next((k for k in KINDS[1:] if k in whole.lower()), "image")
    kind = _KIND_OF.get(noun.lower(), spelled)
    path = (found["inner"] or "").strip()
    if path and _TAG.search(path) is None and path not in (".", "./"):
        return Tag(kind, whole, path=path)
    return Tag(kind, whole, int(number) if number else None)
