"""JSON objects that hold records: COCO's captions, a list under one of the keys, or records by their ids.

- `{"info": …, "questions": [{…}, …]}`: whichever key holds a list of objects (TextVQA's and DocVQA's `data`, VQAv2's
  `questions`, Karpathy's `images`, MiniGPT-4's `annotations`). VQAv2 names pictures by number, and in its head which
  (`data_subtype`): each question gets the file's name.
- `{"1": {…}, "2": {…}}`: GQA, ScienceQA, OCR-VQA; the key is the record's id.
- COCO (and STAIR, nocaps): `images` with `id` and `file_name`, `annotations` with `image_id` and `caption`.

Lists and ids are read a record at a time; COCO's captions are held in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opticnerve.data.sources.base import (
    Handles,
    Location,
    Record,
    Records,
    Twice,
    bad_json,
    not_utf8,
    parse,
    record_of,
    refused,
)
from opticnerve.data.sources.json_text import BOM, JsonText
from opticnerve.types import DataError

_MOST_COCO = 1 << 30
WHOLE = 64 << 20
"""What is no list is parsed whole up to this size, to say what it is instead."""
_ABOUT = {"info", "license", "licenses", "metadata", "meta", "config", "version", "description", "dataset", "args"}


def open_object(path: Path) -> Records:
    """The records of a JSON object, by the first of its lists of objects, or of its members."""
    listed: dict[str, dict[str, Any]] = {}
    seen: list[str] = []
    with path.open("rb") as file:
        text = JsonText(file, path)
        text.next_sign()
        for key, _ in text.members():
            seen.append(key)
            if text.next_sign() != "[":
                value = text.value()
                if isinstance(value, dict) and value and key not in _ABOUT and not listed:
                    return JsonObject(path, None)
                continue
            first = next((item for item, _, _ in _all_or_first(text, key)), None)
            if isinstance(first, dict):
                listed[key] = first
            if key not in ("images", "annotations") and isinstance(first, dict):
                break
            if key == "images" and isinstance(first, dict) and "sentences" in first:
                break
    if {"images", "annotations"} <= listed.keys() and "caption" in listed["annotations"]:
        return CocoCaptions(path)
    found = [k for k in listed if k != "categories"]
    pictures = "images" in seen and found == ["annotations"]  # with their boxes, not with what is said of them
    if pictures or len(found) != 1 or (found == ["images"] and "sentences" not in listed["images"]):
        raise refused_as(path, f"an object with the keys {', '.join(seen[:12])}")
    return JsonObject(path, found[0])


def _all_or_first(text: JsonText, key: str) -> Iterator[tuple[Any, int, int]]:
    """The items of a list; of what may be COCO's, all, for what stands behind it is wanted, too."""
    items = text.items(whole=False)
    first = next(items, None)
    if first is None:
        return
    if key in ("images", "annotations") or not isinstance(first[0], dict):
        for _ in items:
            pass
    yield first


class JsonObject:
    """The records of an object: those of the list under `key`, or its members."""

    def __init__(self, path: Path, key: str | None) -> None:
        self.path, self.files, self.key = path, [path], key
        self._handles = Handles(self.files)
        self._head: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Record | DataError]:
        head: dict[str, Any] = {}
        with self.path.open("rb") as file:
            text = JsonText(file, self.path)
            text.next_sign()
            index = 0
            for key, start in text.members():
                if self.key is not None and text.next_sign() == "[":
                    for number, (entry, begin, size) in enumerate(text.items(whole=False)):
                        if key == self.key:
                            self._head = head
                            yield self._tried(entry, None, number, Location(0, begin, size))
                        elif isinstance(entry, dict) and self.key != "images":
                            problem = f"{self.key} and {key} both list records"
                            raise refused(self.path, problem, "write each into a file of its own")
                    continue
                value = text.value()
                if self.key is None and isinstance(value, dict | Twice) and key not in _ABOUT:
                    self._head = head
                    yield self._tried(value, key, index, Location(0, start, text.byte - start))
                    index += 1
                elif isinstance(value, str | int):
                    head[key] = value

    def at(self, place: Location, index: int) -> Record:
        if self._head is None:
            next(iter(self), None)  # reads what stands before the records
        raw, key = self._handles.read(*place), None
        try:
            entry = json.loads(raw if self.key is not None else b"{" + raw + b"}")
        except ValueError as e:
            raise bad_json(f"{self.path}[{index}]", str(e)) from e
        if self.key is None:
            key, entry = next(iter(entry.items()))
        return self._record(entry, key, index, place)

    def _tried(self, entry: object, key: str | None, index: int, place: Location) -> Record | DataError:
        try:
            return self._record(entry, key, index, place)
        except DataError as e:
            return e

    def _record(self, entry: object, key: str | None, index: int, place: Location) -> Record:
        where = f"{self.path}[{index if key is None else key[:60]!r}]"
        if isinstance(entry, Twice):
            raise bad_json(where, str(entry))
        made = record_of(entry, where, index, place)
        fields = made.fields
        if key is not None:
            fields.setdefault("id", key)
        if self.key == "images" and "sentences" in fields:
            _of_karpathy(fields)
        subtype, number = (self._head or {}).get("data_subtype"), fields.get("image_id")
        if isinstance(subtype, str) and isinstance(number, int) and "image" not in fields:
            fields["image"] = f"COCO_{subtype}_{number:012d}.jpg"  # VQAv2 and OK-VQA
        return made


def _of_karpathy(fields: dict[str, Any]) -> None:
    """A picture of Karpathy's splits: its name, and what is said of it."""
    folder, name, said = (fields.pop(k, None) for k in ("filepath", "filename", "sentences"))
    fields["file_name"] = f"{folder}/{name}" if folder else name
    fields["captions"] = [s.get("raw") if isinstance(s, dict) else s for s in said if s] if said else []
    fields.setdefault("id", fields.get("imgid"))


class CocoCaptions:
    """COCO's captions (cocodataset.org/#format-data): `images` with `id` and `file_name`, `annotations` with `image_id`
    and `caption`. Each annotation is a record; the file is held in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, [path]
        self._rows: list[dict[str, Any] | DataError] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": []}

    def __iter__(self) -> Iterator[Record | DataError]:
        for index in range(len(self._read())):
            try:
                yield self.at(Location(0, index, 1), index)
            except DataError as e:
                yield e

    def at(self, place: Location, index: int) -> Record:
        row = self._read()[place.start]
        if isinstance(row, DataError):
            raise row
        return Record(row, f"{self.path}[{index}]", index, place)

    def _read(self) -> list[dict[str, Any] | DataError]:
        if self._rows:
            return self._rows
        if self.path.stat().st_size > _MOST_COCO:
            raise refused_as(self.path, f"an object of more than {_MOST_COCO >> 20:,} MiB")
        found = parse(text_of(self.path), self.path, line=None)
        images, notes = (found.get(k) for k in ("images", "annotations"))
        listed = all(isinstance(v, list) and all(isinstance(x, dict) for x in v) for v in (images, notes))
        if not listed or not any("caption" in a for a in notes):
            raise refused_as(self.path, f"an object with the keys {', '.join(list(found)[:12])}")
        names: dict[str, Any] = {}
        for image in images:
            own = str(image.get("id"))
            if names.setdefault(own, image.get("file_name")) != image.get("file_name"):
                raise DataError(f"two images have the id {own}", where=str(self.path), kind="json")
        self._rows = [_annotation(a, names, f"{self.path}[{n}]") for n, a in enumerate(notes)]
        return self._rows


def _annotation(note: dict[str, Any], names: dict[str, Any], where: str) -> dict[str, Any] | DataError:
    own = note.get("image_id")
    if names.get(str(own)) is None:
        problem = f"the annotation's image_id {str(own)[:60]} is none of the images with a file_name"
        return DataError(problem, where=where, remedy="correct or remove it", kind="missing-field")
    fields = {k: v for k, v in note.items() if k not in ("image_id", "id")}
    return fields | {"file_name": names[str(own)]} | ({"id": note["id"]} if note.get("id") is not None else {})


def text_of(path: Path) -> str:
    raw = path.read_bytes().removeprefix(BOM)
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise not_utf8(f"{path}:{line}", e.start, raw[e.start]) from e


def refused_as(path: Path, found: str) -> DataError:
    problem = f"wanted a JSON list of records, found {found}"
    return refused(path, problem, "put the records in a list, or one to a line", "json")
