"""What data say twice, and what of the test is in the training data: the same pictures, pictures that look the same,
and the same questions and answers about them.

Pictures look the same when their difference hashes (dHash, N. Krawetz 2013, Kind of Like That: is each of 8 × 8 points
brighter than its right neighbour, of the picture reduced to 9 × 8 grey points?) differ in at most 4 of 64 bits. Copies
that were scaled or compressed again do; crops and mirror images do not. To find such pairs without comparing all, the
hashes are cut into 5 bands: two that differ in 4 bits agree in one of them (Norouzi et al. 2012, Fast Search in Hamming
Space with Multi-Index Hashing). Plain pictures, whose hashes have fewer than 6 bits of one kind, are not compared: they
would all look alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from opticnerve.types import Conversation

MOST_BITS = 4
PLAIN = 6
_BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))
_AT_ONCE = 1 << 11
_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass
class Listed:
    """How many samples (or pairs) share a trouble, and the first few of them as (place, message)."""

    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)

    def add(self, where: str, message: str, max_listed: int) -> None:
        self.count += 1
        if len(self.examples) < max_listed:
            self.examples.append((where, message))

    def to_dict(self) -> dict[str, Any]:
        return {"count": self.count, "examples": [{"where": w, "message": m} for w, m in self.examples]}


def dhash(picture: PIL.Image.Image) -> int:
    """64 bits that stay the same, or nearly, when a picture is scaled or compressed again."""
    grey = np.asarray(picture.convert("L").resize((9, 8), PIL.Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def near_pairs(hashes: NDArray[Any], others: NDArray[Any] | None = None) -> Iterator[tuple[int, int]]:
    """Pairs (i, j) of hashes (uint64) that differ in at most `MOST_BITS` bits, each once: with i < j within `hashes`,
    or i of `hashes` and j of `others`. Plain ones are passed over."""
    right = hashes if others is None else others
    telling = [np.flatnonzero((_bits(h) >= PLAIN) & (_bits(h) <= 64 - PLAIN)) for h in (hashes, right)]
    for band in range(len(_BANDS)):
        left_keys, right_keys = _band(hashes[telling[0]], band), _band(right[telling[1]], band)
        order = np.argsort(right_keys, kind="stable")
        first = np.searchsorted(right_keys[order], left_keys, "left")
        last = np.searchsorted(right_keys[order], left_keys, "right")
        for i, start, stop in zip(telling[0], first, last, strict=True):
            for at in range(start, stop, _AT_ONCE):
                found = telling[1][order[at : min(stop, at + _AT_ONCE)]]
                near = _bits(right[found] ^ hashes[i]) <= MOST_BITS
                for earlier in range(band):  # it was found there
                    near &= _band(right[found], earlier) != _band(hashes[i], earlier)
                for j in found[near]:
                    if others is not None or i < j:
                        yield int(i), int(j)


def answers_of(conversation: Conversation, pictures: Sequence[str]) -> Iterator[int]:
    """A hash of each question with its answer, the system turn, and the pictures (by name) that they are about."""
    asked, system = "", "".join(m.text.strip() for m in conversation.messages if m.role == "system")
    for message in conversation.messages:
        if message.role in ("user", "tool"):
            asked = message.text.strip()
        elif message.role == "assistant":
            sounds = [str(a.source) if not isinstance(a.source, bytes) else key(a.source) for a in conversation.audios]
            said = (message.text.strip(), *message.calls)
            yield key(repr((*pictures, *sounds, system, asked, *said)).encode("utf-8", "replace"))


def key(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


@dataclass
class Side:
    """What is remembered of one side, training or test: where each was first seen."""

    pictures: dict[str, str] = field(default_factory=dict)
    answers: dict[int, str] = field(default_factory=dict)
    looks: dict[str, int] = field(default_factory=dict)  # picture → dHash, where pictures were opened

    def add(self, conversation: Conversation, pictures: Sequence[str]) -> None:
        place = conversation.where or conversation.id
        for picture in pictures:
            self.pictures.setdefault(picture, place)
        for answer in answers_of(conversation, pictures):
            self.answers.setdefault(answer, place)

    def merge(self, other: Side) -> None:
        """Take what another has; what was here first stays."""
        _take(self.pictures, other.pictures)
        _take(self.answers, other.answers)
        _take(self.looks, other.looks)

    def looks_array(self) -> tuple[list[str], NDArray[Any]]:
        return list(self.looks), np.fromiter(self.looks.values(), np.uint64, len(self.looks))


@dataclass
class Leaks:
    """What of the test is in the training data."""

    pictures: Listed = field(default_factory=Listed)
    near: Listed = field(default_factory=Listed)
    answers: Listed = field(default_factory=Listed)

    NAMES = (("pictures", "test pictures that are trained on"), ("near", "test pictures that look like trained ones"),
             ("answers", "test questions that are trained on with their answers"))  # fmt: skip

    @property
    def ok(self) -> bool:
        return not (self.pictures.count or self.near.count or self.answers.count)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **{name: getattr(self, name).to_dict() for name, _ in self.NAMES}}


def leaks(train: Side, test: Side, max_listed: int = 20) -> Leaks:
    """Compare two sides; each test picture and each question counts once."""
    found = Leaks()
    _shared(found.pictures, train.pictures, test.pictures, max_listed)
    _shared(found.answers, train.answers, test.answers, max_listed)
    names, hashes = train.looks_array()
    others, tested_hashes = test.looks_array()
    counted: set[int] = set()
    for i, j in near_pairs(hashes, tested_hashes):
        if j not in counted and others[j] not in train.pictures:
            counted.add(j)
            found.near.add(test.pictures[others[j]], f"looks like a picture of {train.pictures[names[i]]}", max_listed)
    return found


def _take(mine: dict[_K, _V], theirs: dict[_K, _V]) -> None:
    for name, value in theirs.items():
        mine.setdefault(name, value)


def _shared(listed: Listed, trained: dict[_K, str], tested: dict[_K, str], max_listed: int) -> None:
    for name, place in tested.items():
        if name in trained:
            listed.add(place, f"also in {trained[name]}", max_listed)


_COUNTS = np.array([n.bit_count() for n in range(1 << 16)], np.uint8)


def _bits(hashes: NDArray[Any]) -> NDArray[Any]:
    """How many bits are set in each."""
    sums: NDArray[Any] = _COUNTS[np.ascontiguousarray(hashes).reshape(-1, 1).view(np.uint16)].sum(axis=1)
    return sums


def _band(hashes: NDArray[Any], number: int) -> Any:
    start, width = _BANDS[number]
    return (hashes >> np.uint64(start)) & np.uint64((1 << width) - 1)
