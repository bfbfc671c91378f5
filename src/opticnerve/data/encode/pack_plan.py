"""Which samples share a row, planned ahead from their lengths alone.

Rows have a fixed budget of tokens. Within a window of so many samples the longest are placed first, each in the first
row that has room for it (first-fit decreasing: Johnson 1973, Near-Optimal Bin Packing Algorithms; for language models
Krell et al. 2021, Efficient Sequence Packing without Cross-contamination). A plan is a function of lengths and a key,
so that a resumed run, and every process of it, has the same one.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections.abc import Callable, Sequence

import numpy as np


def first_fit_decreasing(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `tokens`; what is longer by itself stays alone.

    Where placing them in the order given needs fewer rows, which is rare, that is returned.
    """
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), dtype=np.int64)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
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
    heap = [(0, rank) for rank in range(world)]
    dealt: list[list[int]] = [[] for _ in range(world)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, rank = heapq.heappop(heap)
        dealt[rank].append(i)
        if len(dealt[rank]) < each:
            heapq.heappush(heap, (tokens + lengths[i], rank))
    rows = each // accumulate
    return [[mine[k * rows : (k + 1) * rows] for k in range(accumulate)] for mine in dealt]
