"""Sequences of samples and of examples of training that are read when they are asked for: a few bytes each."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from opticnerve.data.dataset.index import SIDES, Index, picture_key, sides_of
from opticnerve.data.formats.converters import merged
from opticnerve.types import Conversation

NO_MEDIA = (
    "none of its samples has a picture or a sound, and the recipe has an encoder: nothing is learned about media; "
    "see with `opticnerve data check` which fields the data have, and docs/data.md which are read"
)
_T = TypeVar("_T")
Example = tuple[Sequence[Conversation], int | None]


@dataclass
class Groups:
    """Members of groups, one group after the other: group `g` has `members[starts[g]:starts[g + 1]]`."""

    members: NDArray[Any]
    starts: NDArray[Any]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, group: int) -> NDArray[Any]:
        return self.members[self.starts[group] : self.starts[group + 1]]

    @classmethod
    def of(cls, keys: NDArray[Any]) -> Groups:
        """Positions with equal keys together; groups in the order of their first members, members in theirs."""
        _, first, group = np.unique(keys, return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first, kind="stable")] = np.arange(len(first))
        group = rank[group]
        counts = np.bincount(group, minlength=len(first))
        starts = np.concatenate([[0], np.cumsum(counts)])
        return cls(np.argsort(group, kind="stable").astype(np.uint32), starts)


class Indexed(Sequence[_T]):
    """What is found again by its number: items by `item`, some of them by `only`."""

    NOUN = "sample"

    def item(self, number: int) -> _T:
        raise NotImplementedError

    def only(self, numbers: NDArray[Any]) -> Sequence[_T]:
        """Some of them, in the order given."""
        raise NotImplementedError

    @overload
    def __getitem__(self, number: int) -> _T: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[_T]: ...
    def __getitem__(self, number: int | slice) -> _T | Sequence[_T]:
        if isinstance(number, slice):
            return self.only(np.arange(len(self), dtype=np.uint32)[number])
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self.NOUN} {number} of {len(self)}")
        return self.item(number % len(self))


class Samples(Indexed[Conversation]):
    """The conversations of an index, each read when it is asked for.

    Args:
        chosen: which rows of the index (or which groups), in their order; default: all.
        groups: rows of which each group is one conversation.
    """

    def __init__(self, index: Index, chosen: NDArray[Any] | None = None, groups: Groups | None = None) -> None:
        self.found, self.chosen, self.groups = index, chosen, groups

    def __len__(self) -> int:
        if self.chosen is not None:
            return len(self.chosen)
        return len(self.found) if self.groups is None else len(self.groups)

    def item(self, number: int) -> Conversation:
        item = number if self.chosen is None else int(self.chosen[number])
        if self.groups is None:
            return self.found.sample(item)
        return merged([self.found.sample(int(row)) for row in self.groups[item]])

    def only(self, numbers: NDArray[Any]) -> Samples:
        """Some of them, in the order given."""
        return Samples(self.found, numbers if self.chosen is None else self.chosen[numbers], self.groups)

    def first_rows(self) -> NDArray[Any]:
        """The row of the index with which each sample begins."""
        rows = np.arange(len(self.found)) if self.groups is None else self.groups.members[self.groups.starts[:-1]]
        return rows if self.chosen is None else rows[self.chosen]

    def rows(self) -> NDArray[Any]:
        """All rows of the index that the samples are made of."""
        if self.groups is None or self.chosen is None:
            return self.first_rows() if self.groups is None else self.groups.members
        return np.concatenate([self.groups[int(g)] for g in self.chosen]) if len(self.chosen) else self.chosen

    def apart(self, share: float, *, held_out: bool) -> Samples:
        """The samples that a split of so much holds out, or those that it leaves: by the hashes of their pictures'
        names (of their words, where there are none), so that no picture is on both sides. A sample that shows pictures
        of both sides is on neither.

        Of samples with several pictures and sounds, the index does not tell, and they are read.
        """
        first = self.first_rows()
        low = high = self.found.rows["side"][first]
        if len(several := np.flatnonzero(self.found.rows["pieces"][first] > 1)):
            low, high = low.copy(), high.copy()
            for number in several:
                sides = sides_of(self.found.sample(int(first[number])))
                low[number], high[number] = min(sides), max(sides)
        limit = round(share * SIDES)
        return self.only(np.flatnonzero(high < limit if held_out else low >= limit).astype(np.uint32))

    def by_picture(self) -> Groups:
        """Samples about the same pictures, together. Text-only samples share no picture; each stays by itself."""
        keys = self.found.rows["picture"][self.first_rows()]
        alone = keys == 0
        keys[alone] = np.arange(alone.sum(), dtype=np.uint64) * 2  # a picture's key is odd
        return Groups.of(keys)


class Joined(Indexed[_T]):
    """Several sequences, one after the other."""

    def __init__(self, parts: Sequence[Sequence[_T]]) -> None:
        self.parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def ends(self) -> list[int]:
        """Where each of them ends."""
        return self._ends

    def item(self, number: int) -> _T:
        part = bisect_right(self._ends, number)
        return self.parts[part][number - (self._ends[part - 1] if part else 0)]

    def only(self, numbers: NDArray[Any]) -> Sequence[_T]:
        return [self[int(n)] for n in numbers]


@dataclass
class Entry(Indexed[Example]):
    """The examples of one data entry. `groups`: samples that share a prefix, of which `per_image` are drawn at a
    time."""

    samples: Sequence[Conversation]
    groups: Groups | None = None
    per_image: int | None = None
    repeat: int = 1

    @property
    def once(self) -> int:
        return len(self.samples) if self.groups is None else len(self.groups)

    def __len__(self) -> int:
        return self.once * self.repeat

    def item(self, number: int) -> Example:
        number %= self.once
        if self.groups is None:
            return [self.samples[number]], None
        assert isinstance(self.samples, Samples)
        return self.samples.only(self.groups[number]), self.per_image


class Examples(Joined[Example]):
    """The examples of all data entries of a stage, one entry after the other."""

    NOUN = "example"

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__(entries)
        self.entries = entries

    def only(self, numbers: NDArray[Any]) -> ExampleSubset:
        return ExampleSubset(self, numbers)

    def samples(self) -> int:
        """How many samples all examples have."""
        return sum(e.repeat * (e.once if e.groups is None else len(e.groups.members)) for e in self.entries)

    def left_out(self) -> int:
        """How many records `where` left out."""
        return sum(e.samples.found.left_out for e in self.entries if isinstance(e.samples, Samples))

    def with_media(self) -> int:
        """How many samples have a picture or a sound; of what is not indexed, all are taken to have one."""
        found = 0
        for entry in self.entries:
            if isinstance(entry.samples, Samples):
                found += int((entry.samples.found.rows["pieces"][entry.samples.rows()] > 0).sum())
            else:
                found += len(entry.samples)
        return found

    def pictures(self) -> int:
        """How many different pictures there are. Of samples that show one, the index tells; others are read."""
        keys = [np.zeros(0, np.uint64)]
        for samples in (e.samples for e in self.entries if isinstance(e.samples, Samples)):
            numbers = samples.rows()
            rows = samples.found.rows[numbers]
            alone = (rows["images"] == 1) & (rows["pieces"] == 1)
            keys.append(np.unique(rows["picture"][alone]))
            several = numbers[(rows["images"] > 0) & ~alone]
            shown = (i.source for n in several for i in samples.found.sample(int(n)).images)
            keys.append(np.fromiter((picture_key([source]) for source in shown), np.uint64))
        return len(np.unique(np.concatenate(keys)))


@dataclass
class ExampleSubset(Indexed[Example]):
    """Some of the examples; `kept`: of an example (by its number here) only these members."""

    examples: Sequence[Example]
    numbers: NDArray[Any]
    kept: dict[int, list[int]] = field(default_factory=dict)

    NOUN = "example"

    def __len__(self) -> int:
        return len(self.numbers)

    def item(self, number: int) -> Example:
        conversations, count = self.examples[int(self.numbers[number])]
        members = self.kept.get(number)
        return (conversations if members is None else [conversations[k] for k in members]), count

    def ends(self) -> list[int]:
        """Where those of each source end; they stand in the order of the whole."""
        return [int(n) for n in np.searchsorted(self.numbers, source_ends(self.examples))]

    def only(self, numbers: NDArray[Any]) -> ExampleSubset:
        kept = {new: self.kept[old] for new, old in enumerate(numbers.tolist()) if old in self.kept}
        return ExampleSubset(self.examples, self.numbers[numbers], kept)


def source_ends(examples: Sequence[Example]) -> list[int]:
    """Where the examples of each source end; what is no list of sources is one."""
    return examples.ends() if isinstance(examples, Examples | ExampleSubset) else [len(examples)]
