"""Where a picture, a sound or a video lies (a file, bytes, a `data:` URL): found, named and hashed, not decoded.

Nothing is fetched here (`media.web` does, where it is asked to). Errors are raised without saying which sample it was;
`errors_at` adds that in one place.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from opticnerve.common.atomic import sha256
from opticnerve.types import DataError

Kind = Literal["image", "video", "audio"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_NOUN: dict[Kind, str] = {"image": "picture", "audio": "sound", "video": "video"}
_URL: dict[Kind, str] = {"image": "image/png", "audio": "audio/wav", "video": "video/mp4"}


@contextmanager
def errors_at(where: str, name: str = "", kind: Kind = "image") -> Iterator[None]:
    """A `DataError` that does not say where it was gets `where`; with `name`, what the file system refuses is one."""
    try:
        yield
    except DataError as e:
        if e.where or not where:
            raise
        raise DataError(e.problem, where=where, remedy=e.remedy, kind=e.kind) from e
    except OSError as e:
        if not name:
            raise
        problem = f"{name} cannot be read: {e.strerror or e}"
        raise DataError(problem, where=where, remedy=unreadable(kind, "").remedy, kind=f"unreadable-{kind}") from e


def unreadable(kind: Kind, problem: str, remedy: str = "") -> DataError:
    remedy = remedy or f"replace the {_NOUN[kind]} or remove the sample"
    return DataError(problem, remedy=remedy, kind=f"unreadable-{kind}")


def is_url(source: str) -> bool:
    """Whether this is an address on the web, which is fetched where a `media_cache` says so alone."""
    return re.match(r"https?://", source, re.IGNORECASE) is not None


def decode_data_url(url: str, kind: Kind = "image") -> bytes:
    """The bytes in `data:image/png;base64,…`.

    Raises:
        DataError: not base64 (kind `unreadable-image`).
    """
    head, comma, body = url.partition(",")
    remedy = f"write data:{_URL[kind]};base64,…"
    if not comma or not head.lower().endswith(";base64"):
        raise unreadable(kind, f"the data URL {head[:60]!r} is not base64", remedy)
    return base64_bytes(body, kind, f"the data URL {head[:60]!r}")


def base64_bytes(body: str, kind: Kind, name: str) -> bytes:
    """What base64 says: with line breaks, without padding, in the alphabet of addresses (`-_`), as people have it.

    Raises:
        DataError: it is not base64 (kind `unreadable-…`); `name`: what the error calls it.
    """
    plain = re.sub(r"\s+|%0[AaDd]", "", body).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as e:
        raise unreadable(kind, f"{name} does not hold valid base64: {e}") from e


def name_of(source: object, kind: Kind) -> str:
    """What an error calls it."""
    if isinstance(source, bytes):
        return f"the {_NOUN[kind]} of {len(source):,} bytes"
    if isinstance(source, str) and source[:5].lower() == "data:":
        return f"the {_NOUN[kind]} in a data URL"
    return str(source)


def locate(source: Path | str | bytes, kind: Kind) -> Path | bytes:
    """A regular file that is not empty, or bytes: what may hold a picture or a sound.

    Raises:
        DataError: kind `missing-…`, `url` or `unreadable-…`.
    """
    name, noun = name_of(source, kind), _NOUN[kind]
    if isinstance(source, str):
        if is_url(source):
            problem = f"{name} is a web address, and opticnerve fetches nothing"
            raise DataError(problem, remedy=f"download the {noun} and give the file's path", kind="url")
        source = decode_data_url(source, kind) if source[:5].lower() == "data:" else Path(source)
    if isinstance(source, bytes):
        if not source:
            raise unreadable(kind, f"{name} is empty")
        return source
    try:
        if not source.exists():
            raise DataError(f"{name} does not exist", remedy="check the path", kind=f"missing-{kind}")
        if source.is_dir():
            raise unreadable(kind, f"{name} is a folder, not a {noun}")
        if not source.is_file():
            raise unreadable(kind, f"{name} is not a regular file")
        if source.stat().st_size == 0:
            raise unreadable(kind, f"{name} is an empty file")
    except OSError as e:
        raise unreadable(kind, f"{name} cannot be reached: {e.strerror or e}") from e
    return source


def digest(source: Path | str | bytes, kind: Kind, *, where: str = "") -> str:
    """SHA-256 of the stored bytes, not decoded: equal for equal files."""
    with errors_at(where, name_of(source, kind), kind):
        located = locate(source, kind)
        return hashlib.sha256(located).hexdigest() if isinstance(located, bytes) else sha256(located)
