"""What a record holds and its reader did not look at: passed over where it is nobody's loss, else an error.

One check for all formats, after the conversation has been made: `Fields` knows what was read. An error are fields that
name media (other media than those that were used), that change what is learned, and, where the format was told by the
fields alone, words of a question that the format has no use for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opticnerve.data.formats.fields import Fields, empty
from opticnerve.data.formats.media import ends_alike
from opticnerve.data.formats.names import file_names, kind_by_name, kind_by_value, kind_of, names_by_number
from opticnerve.data.formats.turns import REFUSED, WEIGHTS
from opticnerve.data.media.files import is_url
from opticnerve.types import DataError

QUESTION = ("prompt", "question", "query", "instruction", "context", "hint", "choices", "options", "answer", "answers")
_DEEPEST = 6


def check_unread(fields: Fields, *, format: str, strict: bool, media: int) -> None:
    """Raise an error (kind `unused-field`) for the first field that must not be passed over.

    Args:
        strict: words of a question are not passed over either. media: how many the conversation has.
    """
    used = set(_files_used(fields, 0))
    for path, key, value in _unread(fields, "", 0):
        if (kind := kind_of(key, value)) and not _is_used(key, value, used, media):
            raise _unused(path, f"names {kind} files", value, format)
        if not media and names_by_number(key) and not empty(value):
            raise _unused(path, "points at a picture", value, format)
        if key in WEIGHTS or (key in REFUSED and path != key):
            if not empty(value):
                raise _unused(path, "may change what is learned", value, format)
        elif strict and path == key and key in QUESTION and format in ("captions", "vqa") and not empty(value):
            raise _unused(path, "belongs to the question", value, format)
    if not empty(fields.get("tools")):
        raise _unused("tools", "changes the prompt", fields["tools"], format)


def _unread(fields: dict[str, Any], before: str, depth: int) -> Iterator[tuple[str, str, Any]]:
    """(path, key, value) of all that was not looked at, objects within objects too."""
    read = fields.read if isinstance(fields, Fields) else ()
    for key, value in dict.items(fields):
        if not isinstance(key, str):
            continue
        path = f"{before}{key}"
        if key not in read:
            yield path, key, value
            if kind_by_value(value):  # datasets' {"bytes", "path"} is told already
                continue
        if depth < _DEEPEST:
            inner = [value] if isinstance(value, dict) else value if isinstance(value, list) else ()
            for number, item in enumerate(inner):
                if isinstance(item, dict) and (key not in read or isinstance(item, Fields)):
                    at = f"{path}[{number}]." if isinstance(value, list) else f"{path}."
                    yield from _unread(item, at, depth + 1)


def _files_used(fields: Fields, depth: int) -> Iterator[tuple[str, ...]]:
    """The files that what was read names."""
    for key, value in fields.raw():
        if key not in fields.read:
            continue
        if kind_by_name(key) or kind_by_value(value):
            yield from file_names(value)
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, Fields) and depth < _DEEPEST:
                yield from _files_used(item, depth + 1)


def _is_used(key: str, value: Any, used: set[tuple[str, ...]], media: int) -> bool:
    """The same file again, or, under another name than one for media, the web address that media at hand came from."""
    if media and kind_by_name(key) is None and isinstance(value, str) and is_url(value):
        return True
    names = list(file_names(value))
    return bool(names) and all(any(ends_alike(name, other) for other in used) for name in names)


def _unused(path: str, does: str, value: Any, format: str) -> DataError:
    shown = value if isinstance(value, str) else type(value).__name__
    return DataError(
        f"{path} ({shown[:60]}) {does}, and is not read in the format {format}", kind="unused-field",
        remedy=f"put it where the format has it (docs/data.md), or ignore: [{path.rpartition('.')[2]}]",
    )  # fmt: skip
