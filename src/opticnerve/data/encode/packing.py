"""Samples side by side in one row, each blind to the others.

A row is a list of groups; a group is a shared prefix (a picture and what stands before the question) and its branches
(the questions with their answers). A branch sees its prefix and itself, and its positions go on from the prefix, so
that loss and gradients are those of the separate samples; the picture is paid for once.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from opticnerve.data.encode.tokenize import IGNORE, Encoded
from opticnerve.types import AudioPart, DataError, ImagePart


@dataclass(slots=True)
class Row:
    """Tokens of one row, all lists of equal length.

    `targets[i]`: the token that position i should predict, or -100 (already shifted). `group[i]`, `branch[i]`: whom
    position i may attend to (branch 0 is the prefix).
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

    For each number of rows the samples are dealt out, the longest first, each to the shortest row so far (Graham 1969,
    Bounds on Multiprocessing Timing Anomalies); of all that keep the budget the one with the fewest positions wins,
    padding included, so never more than samples in rows of their own have. A row that is longer by itself stays alone.
    Which samples a step sees does not change, only how they stand: loss and gradients are those of the rows apart.
    """
    lengths = [len(r) for r in rows]
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    limit = max([budget, *lengths])
    best: list[list[int]] = [[i] for i in order]
    fewest = len(rows) * max(lengths)
    for count in range(len(rows) - 1, 0, -1):
        dealt = _deal(order, lengths, count)
        longest = max(sum(lengths[i] for i in members) for members in dealt)
        if longest > limit:
            break  # fewer rows are only longer
        alone = all(len(members) == 1 or sum(lengths[i] for i in members) <= budget for members in dealt)
        if alone and count * longest < fewest:
            best, fewest = dealt, count * longest
    return [side_by_side([rows[i] for i in sorted(members)]) for members in sorted(best, key=min)]


def _deal(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    heap = [(0, k) for k in range(count)]
    dealt: list[list[int]] = [[] for _ in range(count)]
    for i in order:
        filled, k = heapq.heappop(heap)
        dealt[k].append(i)
        heapq.heappush(heap, (filled + lengths[i], k))
    return dealt


def side_by_side(rows: Sequence[Row]) -> Row:
    """One row from several, the samples of each blind to the others'."""
    if len(rows) == 1:
        return rows[0]
    joined, groups = Row(), 0
    for row in rows:
        for name in ("input_ids", "positions", "targets", "branch", "images", "audios", "questions", "ids"):
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
        remedy="put the picture first in each question, or leave out share_prefix",
    )  # fmt: skip


def _first_label(sample: Encoded) -> int:
    return next(i for i, label in enumerate(sample.labels) if label != IGNORE)
