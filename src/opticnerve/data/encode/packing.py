"""Samples side by side in one row, each blind to the others.

A row is a list of groups; a group is a shared prefix (a picture and what stands before the question) and its branches
(the questions with their answers). A branch sees its prefix and itself, and its positions go on from the prefix, so
that loss and gradients are those of the separate samples; the picture is paid for once.

`PackPlan` says ahead which samples share a row, from their lengths alone. Rows have a fixed budget of tokens. Within a
window of so many samples the longest are placed first, each in the first row that has room for it (first-fit
decreasing: Johnson 1973, Near-Optimal Bin Packing Algorithms; for language models Krell et al. 2021, Efficient Sequence
Packing without Cross-contamination). A plan is a function of lengths and a key, so that a resumed run, and every
process of it, has the same one.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from opticnerve.data.encode.tokenize import IGNORE, Encoded
from opticnerve.types import AudioPart, DataError, ImagePart


@dataclass(slots=True)
class Row:
    """Tokens of one row, all lists of equal length.

    `targets[i]`: the token that position i should predict, or -100 (already shifted). `group[i]`, `branch[i]`: whom
    position i may attend to (branch 0 is the prefix). `sources[g]`: which data entry of the stage group g is
    of, where it is known.
    """

    input_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    images: list[ImagePart] = field(default_factory=list)
    audios: list[AudioPart] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def plain(self) -> bool:
        """One sample and nothing shared: a causal mask is enough."""
        return not self.group or (self.group[-1] == 0 and max(self.branch) == 0)


def pack(groups: Sequence[Sequence[Encoded]]) -> Row:
    """One row from groups of samples; the samples of a group share their pictures and their first tokens."""
    row = Row()
    for number, samples in enumerate(groups):
        _append(row, number, samples)
    return row


def fit(rows: Sequence[Row], budget: int) -> list[Row]:
    """The same samples side by side, in rows of at most `budget` tokens, with as little padding as can be found.

    For each number of rows the samples are dealt out, the longest first, each to the shortest row so far; of all that
    keep the budget the one with the fewest positions wins, padding included, so never more than samples in rows of
    their own have. A row that is longer by itself stays alone.
    Which samples a step sees does not change, only how they stand: loss and gradients are those of the rows apart.
    """
    lengths = [len(r) for r in rows]
    limit = max([budget, *lengths])
    best: list[list[int]] = [[i] for i in range(len(rows))]
    fewest = len(rows) * max(lengths)
    for count in range(len(rows) - 1, 0, -1):
        dealt = _deal(lengths, count)
        longest = max(sum(lengths[i] for i in members) for members in dealt)
        if longest > limit:
            break  # fewer rows are only longer
        alone = all(len(members) == 1 or sum(lengths[i] for i in members) <= budget for members in dealt)
        if alone and count * longest < fewest:
            best, fewest = dealt, count * longest
    return [side_by_side([rows[i] for i in sorted(members)]) for members in sorted(best, key=min)]


def side_by_side(rows: Sequence[Row]) -> Row:
    """One row from several, the samples of each blind to the others'."""
    if len(rows) == 1:
        return rows[0]
    joined, groups = Row(), 0
    for row in rows:
        for name in ("input_ids", "positions", "targets", "branch", "images", "audios", "questions", "ids", "sources"):
            getattr(joined, name).extend(getattr(row, name))
        joined.group += [g + groups for g in row.group]
        groups += max(row.group) + 1
    return joined


def _append(row: Row, number: int, samples: Sequence[Encoded]) -> None:
    shared = shared_prefix(samples)
    first = samples[0]
    row.images += first.images
    row.audios += first.audios
    row.questions += first.questions
    row.ids += [s.id for s in samples]
    if shared == 0:
        _extend(row, first.input_ids, first.labels, start=0, group=number, branch=0)
        return
    _extend(row, first.input_ids[:shared], [IGNORE] * shared, start=0, group=number, branch=0)
    for k, sample in enumerate(samples, start=1):
        _extend(row, sample.input_ids[shared:], sample.labels[shared:], start=shared, group=number, branch=k)


def _extend(row: Row, ids: list[int], labels: list[int], *, start: int, group: int, branch: int) -> None:
    row.input_ids += ids
    row.positions += range(start, start + len(ids))
    row.targets += [*labels[1:], IGNORE]
    row.group += [group] * len(ids)
    row.branch += [branch] * len(ids)


def shared_prefix(samples: Sequence[Encoded]) -> int:
    """Tokens that all samples of a group begin with, ending before the position that predicts a first answer; 0 for
    one.

    Raises:
        DataError: the samples show different pictures, or a picture lies outside what they share.
    """
    if len(samples) == 1:
        return 0
    first = samples[0]
    if any(s.images != first.images or s.audios != first.audios for s in samples[1:]):
        raise _unshareable("show different pictures", samples)
    if any(s.questions != first.questions for s in samples[1:]):
        raise _unshareable("ask an instruction-aware Q-Former different questions", samples)
    limit = min(len(s.input_ids) for s in samples)
    limit = min([limit, *(_first_label(s) - 1 for s in samples)])
    count = 0
    while count < limit and all(s.input_ids[count] == first.input_ids[count] for s in samples[1:]):
        count += 1
    if count == 0:
        raise _unshareable("share no first token", samples)
    if count < max(s.media_end for s in samples):
        raise _unshareable("differ before the end of their pictures", samples)
    return count


def _unshareable(problem: str, samples: Sequence[Encoded]) -> DataError:
    return DataError(
        f"samples of one group {problem}: {', '.join(s.id or s.where for s in samples)}", where=samples[0].where,
        remedy="put the picture first in each question, or leave out share_prefix", kind="conflict",
    )  # fmt: skip


def _first_label(sample: Encoded) -> int:
    return next(i for i, label in enumerate(sample.labels) if label != IGNORE)


# -- which samples share a row, planned ahead -------------------------------------------------------------------------


def first_fit_decreasing(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `tokens`; what is longer by itself stays alone.

    Where placing them in the order given needs fewer rows, which is rare, that is returned.
    """
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), dtype=np.int64)
    for i in _longest_first(lengths):
        fits = room[: len(rows)] >= lengths[i]
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = tokens
        rows[row].append(i)
        room[row] -= lengths[i]
    plain = next_fit(lengths, tokens)
    return [sorted(r) for r in rows] if len(rows) <= len(plain) else plain


def next_fit(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """The same, each into the last row or a new one, in the order given."""
    rows: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if not rows or length > room:
            rows.append([])
            room = tokens
        rows[-1].append(i)
        room -= length
    return rows


class PackPlan:
    """Rows of samples, planned window by window; four bytes a sample and eight a row.

    Args:
        length: tokens of a sample, or None for one that is left out.
        tokens, window: the budget of a row, and how many samples are arranged at a time.
        key: what the order of the rows within a window depends on (beside the lengths).
    """

    def __init__(self, length: Callable[[int], int | None], *, tokens: int, window: int, key: str) -> None:
        self.tokens, self.window, self.key = tokens, window, key
        self.planned = 0
        self._length = length
        self._indices, self._starts, self.lengths = array("I"), array("I", [0]), array("I")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_length": None}  # a plan that travels is made

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> array[int]:
        """The samples of a row."""
        return self._indices[self._starts[row] : self._starts[row + 1]]

    def extend(self, stop: int | None = None) -> None:
        """Plan one more window of samples, which ends before sample `stop`."""
        first = self.planned
        self.planned = first + self.window if stop is None else min(first + self.window, stop)
        found = [(v, n) for v in range(first, self.planned) if (n := self._length(v)) is not None]
        lengths = [n for _, n in found]
        rows = first_fit_decreasing(lengths, self.tokens)
        # The fullest come first, and the longest samples with them: no step shall know.
        random.Random(f"{self.key}/{first}").shuffle(rows)
        for row in rows:
            self._indices.extend(found[i][0] for i in row)
            self._starts.append(len(self._indices))
            self.lengths.append(sum(lengths[i] for i in row))


def deal(lengths: Sequence[int], *, accumulate: int, world: int) -> list[list[list[int]]]:
    """The rows of a step for each process and each of its micro-batches, as indices: `[process][micro-batch]`.

    Every process gets equally many rows and nearly as many tokens: the longest are dealt first, each to the process
    that has the least so far. Within a process, rows of like length share a micro-batch, for it is padded to its
    longest.
    """
    each = len(lengths) // world
    if each * world != len(lengths) or each % accumulate:
        raise ValueError(f"{len(lengths)} rows do not split over {world} processes and {accumulate} micro-batches")
    rows = each // accumulate
    return [[mine[k * rows : (k + 1) * rows] for k in range(accumulate)] for mine in _deal(lengths, world, each)]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _deal(lengths: Sequence[int], count: int, most: int | None = None) -> list[list[int]]:
    """Each to the one of `count` that has the least so far and fewer than `most`, the longest first (Graham 1969,
    Bounds on Multiprocessing Timing Anomalies)."""
    heap = [(0, k) for k in range(count)]
    dealt: list[list[int]] = [[] for _ in range(count)]
    for i in _longest_first(lengths):
        filled, k = heapq.heappop(heap)
        dealt[k].append(i)
        if len(dealt[k]) != most:
            heapq.heappush(heap, (filled + lengths[i], k))
    return dealt
