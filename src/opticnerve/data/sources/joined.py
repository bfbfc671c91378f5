"""Two files that belong together: questions in the one, their answers in the other (VQAv2, OK-VQA).

A record of the first takes the fields of that record of the second which has the same `question_id`, or, where there
are none, the same `id`, `sample_id`, `image_id` or `image`. Of the second file its places alone are held in memory, 36
bytes a record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opticnerve.data.sources.base import Location, Record, Records, refused
from opticnerve.types import DataError

KEYS = ("question_id", "questionId", "id", "sample_id", "image_id", "image", "file_name")
_PLACE = np.dtype([("key", "<u8"), ("start", "<u8"), ("file", "<u4"), ("size", "<u4"), ("index", "<u4")])


class Annotated:
    """The records of one file with what another says of them.

    Raises:
        DataError: when it is read: no key that both files have, or one that stands twice in the second.
    """

    def __init__(self, records: Records, annotations: Records) -> None:
        self.records, self.annotations = records, annotations
        self.files = [*records.files, *annotations.files]
        self._key = ""
        self._places: NDArray[Any] | None = None
        self._keys: NDArray[Any] = np.empty(0, "<u8")  # of the places, side by side: a search in these copies nothing

    def __iter__(self) -> Iterator[Record | DataError]:
        for item in self.records:
            if not isinstance(item, Record):
                yield item
                continue
            try:
                yield self._joined(item)
            except DataError as e:
                if e.kind == "format":  # of the whole file
                    raise
                yield e

    def at(self, place: Location, index: int) -> Record:
        return self._joined(self.records.at(place, index))

    def _joined(self, record: Record) -> Record:
        if self._places is None:
            self._read(record)
        assert self._places is not None
        own = record.fields.get(self._key)
        key = np.uint64(_hash(own))
        at = int(np.searchsorted(self._keys, key))
        if own is None or at == len(self._keys) or self._keys[at] != key:
            raise DataError(
                f"{self._files()} has no record of the {self._key} {str(own)[:60]}", where=record.where,
                remedy="name the annotations of these questions, or take the record out", kind="missing-field",
            )  # fmt: skip
        other = self._annotation(self._places[at]).fields
        if unlike := [k for k, v in other.items() if k in record.fields and k != "id" and record.fields[k] != v]:
            here, there = (str(found[unlike[0]])[:60] for found in (record.fields, other))
            problem = f"{unlike[0]} is {here!r} here and {there!r} in {self._files()}"
            remedy = "name the annotations of these questions"
            raise DataError(problem, where=record.where, remedy=remedy, kind="conflict")
        return replace(record, fields={**other, **record.fields})

    def _read(self, first: Record) -> None:
        rows: list[tuple[int, int, int, int, int]] = []
        for item in self.annotations:
            if isinstance(item, DataError):
                raise DataError(item.problem, where=item.where, remedy=item.remedy, kind="format") from item
            if not self._key:
                self._key = next((k for k in KEYS if k in first.fields and k in item.fields), "")
                if not self._key:
                    there = ", ".join(list(item.fields)[:12])
                    problem = f"nothing says which of the annotations belongs to which record; their fields are {there}"
                    raise refused(self._files(), problem, f"both want one of {', '.join(KEYS)}")
            file, start, size = item.place
            rows.append((_hash(item.fields.get(self._key)), start, file, size, item.index))
        places = np.sort(np.array(rows, dtype=_PLACE), order="key")
        if (twice := np.flatnonzero(places["key"][1:] == places["key"][:-1])).size:
            again = self._annotation(places[twice[0]])
            problem = f"two annotations have the {self._key} {str(again.fields.get(self._key))[:60]}"
            raise refused(self._files(), problem, "each record has one")
        self._places, self._keys = places, np.ascontiguousarray(places["key"])

    def _annotation(self, row: Any) -> Record:
        """Of one of the places."""
        place = Location(int(row["file"]), int(row["start"]), int(row["size"]))
        return self.annotations.at(place, int(row["index"]))

    def _files(self) -> str:
        return str(self.annotations.files[0]) if self.annotations.files else "the annotations"


def _hash(key: object) -> int:
    return int.from_bytes(hashlib.blake2b(str(key).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
