"""Rows of samples: who sees whom, which positions, which targets. The loss itself is tested with the objective."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from errors import refused
from opticnerve.data.encode.packing import Row, fit, pack, shared_prefix
from opticnerve.data.encode.tokenize import IGNORE, Encoded
from opticnerve.types import DataError, ImagePart

PICTURE = ImagePart(tiny.picture(0))
IMAGE = 9  # the placeholder's id in these samples


def sample(ids: list[int], learned_from: int, *, name: str = "s", images: list[ImagePart] | None = None) -> Encoded:
    labels = [IGNORE] * learned_from + ids[learned_from:]
    media_end = max((i + 1 for i, t in enumerate(ids) if t == IMAGE), default=0)
    return Encoded(ids, labels, images or [], name, media_end=media_end)


@st.composite
def groups(draw: st.DrawFn) -> list[list[Encoded]]:
    """Samples as a chat template makes them: each group begins alike, then a question, then an answer."""
    made = []
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.lists(st.integers(1, 8), min_size=1, max_size=5))
        group = []
        for _ in range(draw(st.integers(1, 4))):
            question = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
            answer = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
            group.append(sample(start + question + answer, len(start + question)))
        made.append(group)
    return made


def seen_by(row: Row, i: int) -> list[int]:
    """Positions of the row that position i may attend to, in order."""
    return [
        j for j in range(i + 1) if row.group[j] == row.group[i] and row.branch[j] in (0, row.branch[i])
    ]  # fmt: skip


@given(groups())
def test_each_sample_reads_exactly_itself(made: list[list[Encoded]]) -> None:
    """Whatever is packed beside it, the last token of each sample sees the sample, at positions 0, 1, 2, …"""
    row = pack(made)
    samples = [s for group in made for s in group]
    assert row.ids == [s.id for s in samples]
    ends = [
        i
        for i in range(len(row))
        if i + 1 == len(row) or (row.group[i + 1], row.branch[i + 1]) != (row.group[i], row.branch[i])
    ]
    ends = [
        i
        for i in ends
        if row.branch[i] or all(row.branch[j] == 0 for j in range(len(row)) if row.group[j] == row.group[i])
    ]
    assert len(ends) == len(samples)
    for end, one in zip(ends, samples, strict=True):
        seen = seen_by(row, end)
        assert [row.input_ids[j] for j in seen] == one.input_ids
        assert [row.positions[j] for j in seen] == list(range(len(seen)))
        assert [row.targets[j] for j in seen] == [*one.labels[1:], IGNORE]


@given(groups())
def test_every_learned_token_is_a_target_once_and_none_crosses(made: list[list[Encoded]]) -> None:
    row = pack(made)
    assert sum(t != IGNORE for t in row.targets) == sum(s.supervised for g in made for s in g)
    for i in range(len(row) - 1):
        if row.targets[i] != IGNORE:
            assert (row.group[i], row.branch[i]) == (row.group[i + 1], row.branch[i + 1])
            assert row.targets[i] == row.input_ids[i + 1]
    assert row.targets[-1] == IGNORE


@given(groups())
def test_a_shared_prefix_is_paid_for_once(made: list[list[Encoded]]) -> None:
    for group in made:
        shared = shared_prefix(group)
        assert len(pack([group])) == shared + sum(len(s.input_ids) - shared for s in group)
        if len(group) > 1:
            # The position that predicts a first answer token belongs to its sample.
            assert 0 < shared < min(s.labels.index(next(x for x in s.labels if x != IGNORE)) for s in group)


def test_pictures_are_shown_once_for_a_group() -> None:
    one = sample([1, IMAGE, IMAGE, 2, 5, 6], 4, images=[PICTURE])
    two = sample([1, IMAGE, IMAGE, 3, 7, 8], 4, images=[PICTURE])
    row = pack([[one, two]])
    assert row.images == [PICTURE]
    assert row.input_ids.count(IMAGE) == 2
    assert pack([[one], [two]]).images == [PICTURE, PICTURE]
    assert not row.plain
    assert pack([[one]]).plain


def test_a_picture_outside_the_shared_part_is_refused() -> None:
    """Its placeholders would be written for each sample, its features but once: training would crash hours in."""
    one = sample([1, 2, 3, IMAGE, IMAGE, 5, 6], 5, images=[PICTURE], name="first")
    two = sample([1, 2, 4, IMAGE, IMAGE, 7, 8], 5, images=[PICTURE], name="second")
    with refused("conflict", "first, second", "share_prefix", error=DataError):
        pack([[one, two]])


def test_groups_that_share_nothing_are_refused() -> None:
    with refused("conflict", "a, b", "share_prefix", error=DataError):
        pack([[sample([1, 2, 3], 2, images=[PICTURE], name="a"), sample([1, 2, 3], 2, name="b")]])
    with refused("conflict", "a, b", "share_prefix", error=DataError):
        pack([[sample([1, 2, 3], 2, name="a"), sample([2, 2, 3], 2, name="b")]])


def test_torch_free() -> None:
    """Packing is lists: a data worker needs no tensor for it."""
    assert all(isinstance(x, int) for x in pack([[sample([1, 2, 3], 1)]]).targets)
    assert torch.tensor(pack([[sample([1, 2, 3], 1)]]).targets).dtype == torch.int64


@given(st.lists(groups(), min_size=1, max_size=6), st.integers(1, 60))
def test_fitted_rows_hold_the_same_samples_each_reading_itself(made: list[list[list[Encoded]]], budget: int) -> None:
    rows = [pack(one) for one in made]
    fitted = fit(rows, budget)
    assert sorted(i for r in fitted for i in r.ids) == sorted(i for r in rows for i in r.ids)
    assert sum(map(len, fitted)) == sum(map(len, rows))
    assert len(fitted) * max(map(len, fitted)) <= len(rows) * max(map(len, rows))
    assert all(len(r) <= budget for r in fitted if len(r) not in map(len, rows))

    def read(some: list[Row]) -> list[tuple[list[int], list[int], int]]:
        """What each learned position reads, at which places, and what it learns."""
        found = []
        for row in some:
            for i, target in enumerate(row.targets):
                if target != IGNORE:
                    seen = seen_by(row, i)
                    found.append(([row.input_ids[j] for j in seen], [row.positions[j] for j in seen], target))
        return sorted(found)

    assert read(fitted) == read(rows)


def test_the_arrangement_with_the_fewest_positions() -> None:
    rows = [pack([[sample([1] * n, 1, name=str(n))]]) for n in (3, 7, 5, 2, 12)]
    fitted = fit(rows, 10)
    assert [r.ids for r in fitted] == [["3", "5"], ["7", "2"], ["12"]]
    assert fitted[0].group == [0] * 3 + [1] * 5
    # Three rows of eight, not one of 20 and a second that is padded to it.
    assert [len(r) for r in fit([pack([[sample([1] * n, 1)]]) for n in (8, 4, 4, 2, 2, 2, 2)], 20)] == [8, 8, 8]
    # All of one length: nothing to gain, so nothing changes.
    assert [len(r) for r in fit([pack([[sample([1] * 4, 1)]]) for _ in range(6)], 20)] == [4] * 6
