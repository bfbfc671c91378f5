"""Rows planned ahead: within the budget, complete, the same every time, and fair to every process."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opticnerve.data.encode.packing import PackPlan, deal, first_fit_decreasing, next_fit

lengths = st.lists(st.integers(1, 40), max_size=60)


@given(lengths, st.integers(1, 50))
def test_rows_hold_each_sample_once_and_keep_the_budget(given: list[int], tokens: int) -> None:
    rows = first_fit_decreasing(given, tokens)
    assert sorted(i for r in rows for i in r) == list(range(len(given)))
    assert all(len(r) == 1 or sum(given[i] for i in r) <= tokens for r in rows)
    assert len(rows) <= len(next_fit(given, tokens))


def test_the_longest_first_each_where_it_fits_first() -> None:
    assert first_fit_decreasing([2, 6, 3, 7, 2], 10) == [[2, 3], [0, 1, 4]]
    assert first_fit_decreasing([3, 12, 3], 10) == [[1], [0, 2]]
    # Placed by length these would need three rows; in the order given they need two.
    assert first_fit_decreasing([2, 4, 4, 2, 3, 5], 10) == [[0, 1, 2], [3, 4, 5]]


@given(lengths, st.integers(1, 50), st.integers(1, 20), st.integers(0, 3))
def test_a_plan_is_a_function_of_lengths_and_key(given: list[int], tokens: int, window: int, seed: int) -> None:
    def plan() -> PackPlan:
        made = PackPlan(lambda v: given[v], tokens=tokens, window=window, key=str(seed))
        while made.planned < len(given):
            made.extend(stop=len(given))
        return made

    one, two = plan(), plan()
    rows = [list(one[r]) for r in range(len(one))]
    assert rows == [list(two[r]) for r in range(len(two))]
    assert Counter(v for r in rows for v in r) == Counter(range(len(given)))
    assert list(one.lengths) == [sum(given[v] for v in r) for r in rows]
    # Nothing leaves its window, so that what is near in the data stays near.
    assert all(len({v // window for v in r}) == 1 for r in rows)


def test_what_has_no_length_is_left_out_and_a_plan_travels() -> None:
    plan = PackPlan(lambda v: 4 if v % 2 else None, tokens=8, window=6, key="")
    plan.extend()
    plan.extend()
    there = pickle.loads(pickle.dumps(plan))
    assert sorted(v for r in range(len(there)) for v in there[r]) == [1, 3, 5, 7, 9, 11]
    assert max(there.lengths) == 8


def test_the_order_of_rows_does_not_follow_their_lengths() -> None:
    plan = PackPlan(lambda v: 6 + v % 4, tokens=10, window=90, key="k")
    plan.extend()
    assert list(plan.lengths) != sorted(plan.lengths, reverse=True)
    other = PackPlan(lambda v: 6 + v % 4, tokens=10, window=90, key="another")
    other.extend()
    assert [list(plan[r]) for r in range(len(plan))] != [list(other[r]) for r in range(len(other))]


@given(st.lists(st.integers(1, 100), min_size=8, max_size=8), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_processes_get_as_many_rows_and_nearly_as_many_tokens(given: list[int], world: int, accumulate: int) -> None:
    dealt = deal(given, accumulate=accumulate, world=world)
    assert sorted(i for mine in dealt for part in mine for i in part) == list(range(8))
    assert {len(part) for mine in dealt for part in mine} == {8 // world // accumulate}
    tokens = [sum(given[i] for part in mine for i in part) for mine in dealt]
    assert max(tokens) - min(tokens) <= max(given)


def test_tokens_are_dealt_not_rows_alone() -> None:
    assert deal([10, 6, 5, 1], accumulate=1, world=2) == [[[0, 3]], [[1, 2]]]


def test_rows_of_like_length_share_a_micro_batch() -> None:
    assert deal([5, 50, 6, 40], accumulate=2, world=1) == [[[1, 3], [2, 0]]]
    with pytest.raises(ValueError, match="6 rows do not split over 4 processes"):
        deal([1] * 6, accumulate=1, world=4)
