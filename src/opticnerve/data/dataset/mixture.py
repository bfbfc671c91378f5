"""In which turn the sources of a stage come up, where they are mixed by weight or by temperature.

At the end of every block of samples (a step's), each source has had its share of them to less than one sample,
whatever the shares (Tijdeman 1980, The Chairman Assignment Problem: of the sources that are owed a sample, the one
whose turn must come soonest). A block's own order is drawn, so that no process sees one source alone. The turns are a
function of shares and key, as all that a step sees.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections.abc import Iterator, Sequence

from opticnerve.recipe import Stage

_EPSILON = 1e-9  # of a turn, for shares whose sums are not exact


def mixed_shares(stage: Stage, sizes: Sequence[int]) -> list[float] | None:
    """Each source's share of a stage's samples, summing to 1; None where sources follow from their sizes alone.

    Args:
        sizes: samples of each source, for `mixing: {temperature: T}`: shares go with size^(1/T) (Raffel et al. 2020,
            T5, section 3.5.2).
    """
    if stage.mixing is not None:
        rates = [size ** (1 / stage.mixing.temperature) for size in sizes]
    elif stage.data[0].weight is not None:
        rates = [spec.weight or 0.0 for spec in stage.data]  # the recipe sees that all have one
    else:
        return None
    return [rate / sum(rates) for rate in rates]


class Mixture:
    """Sample → (source, which of the source's samples it is), both from 0; six bytes a sample so far.

    Args:
        shares: of each source, summing to 1. block: samples after which the shares hold. key: what a block's order is
            drawn from.
    """

    def __init__(self, shares: Sequence[float], *, block: int, key: str) -> None:
        self.shares, self.block, self.key = list(shares), block, key
        self._sources, self._own = array("H"), array("I")
        self._turns = _Turns(self.shares)
        self._counts = [0] * len(self.shares)

    def __getitem__(self, index: int) -> tuple[int, int]:
        while len(self._sources) <= index:
            turns = [next(self._turns) for _ in range(self.block)]
            random.Random(f"{self.key}/mixture/{len(self._sources)}").shuffle(turns)
            for source in turns:
                self._sources.append(source)
                self._own.append(self._counts[source])
                self._counts[source] += 1
        return self._sources[index], self._own[index]

    def following(self, index: int, most: int) -> Iterator[int]:
        """A sample and those after it of the same source, at most `most`."""
        source = self[index][0]
        while most:
            if self[index][0] == source:
                yield index
                most -= 1
            index += 1


class _Turns(Iterator[int]):
    """The source of each turn, without an end."""

    def __init__(self, shares: Sequence[float]) -> None:
        self.shares, self.turn = shares, 0
        self._slack = 1 / max(1, 2 * len(shares) - 2)
        self._counts = [0] * len(shares)
        self._owed: list[tuple[float, int]] = []  # by when their turn must come
        self._later = [(self._slack / share, source) for source, share in enumerate(shares)]  # from when on it may
        heapq.heapify(self._later)

    def __next__(self) -> int:
        self.turn += 1
        while self._later and (self._later[0][0] <= self.turn + _EPSILON or not self._owed):
            _, source = heapq.heappop(self._later)
            due = (self._counts[source] + 1 - self._slack) / self.shares[source]
            heapq.heappush(self._owed, (due, source))
        _, source = heapq.heappop(self._owed)
        self._counts[source] += 1
        heapq.heappush(self._later, ((self._counts[source] + self._slack) / self.shares[source], source))
        return source
