"""Intervals over seeds and questions, paired differences, curves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from opticnerve.compare import stats
from opticnerve.evaluation.metrics import wilson_interval


def scores(rng: np.random.Generator, seeds: int, questions: int, share: float, spread: float = 0.0) -> np.ndarray:
    shares = np.clip(share + spread * rng.standard_normal((seeds, 1)), 0, 1)
    return (rng.random((seeds, questions)) < shares).astype(float)


def test_one_seed_gives_about_wilsons_interval() -> None:
    table = scores(np.random.default_rng(0), 1, 400, 0.7)
    found = stats.over_seeds(table)
    assert found is not None
    low, high = wilson_interval(table.sum(), 400)
    assert found.mean == pytest.approx(table.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.012)
    assert (found.seeds, found.questions) == (1, 400)


def test_seeds_that_disagree_widen_the_interval() -> None:
    rng = np.random.default_rng(1)
    agree = stats.over_seeds(np.repeat(scores(rng, 1, 300, 0.5), 4, axis=0))
    rows = np.zeros((4, 300))
    rows[:2, :] = scores(rng, 2, 300, 0.9)
    rows[2:, :] = scores(rng, 2, 300, 0.1)
    apart = stats.over_seeds(rows)
    assert agree is not None
    assert apart is not None
    assert apart.high - apart.low > 3 * (agree.high - agree.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        found = stats.over_seeds(scores(rng, 1, 150, 0.6), draws=400)
        assert found is not None
        held += found.low <= 0.6 <= found.high
    assert 180 <= held <= 199


def test_equal_scores_have_an_interval_all_the_same() -> None:
    found = stats.over_seeds(np.ones((2, 20)))
    assert found is not None
    assert (found.low, found.high) == pytest.approx(wilson_interval(20, 20))
    assert found.low < 0.9


def test_nothing_asked_is_no_estimate() -> None:
    assert stats.over_seeds(np.zeros((2, 0))) is None
    assert stats.difference(np.zeros((2, 0)), np.zeros((1, 0))) is None


def test_the_same_seed_draws_the_same() -> None:
    table = scores(np.random.default_rng(3), 2, 50, 0.5)
    assert stats.over_seeds(table, seed=5) == stats.over_seeds(table, seed=5)
    assert stats.over_seeds(table, seed=5) != stats.over_seeds(table, seed=6)


def test_pairing_by_question_finds_what_two_intervals_do_not() -> None:
    rng = np.random.default_rng(4)
    worse = scores(rng, 1, 200, 0.5)
    better = worse.copy()
    better[0, np.flatnonzero(worse[0] == 0)[:12]] = 1  # right wherever the other is, and 12 times more
    one, other = stats.over_seeds(better), stats.over_seeds(worse)
    assert one is not None
    assert other is not None
    assert one.low < other.high  # side by side they overlap
    gap = stats.difference(better, worse)
    assert gap is not None
    assert gap.sure == 1
    assert gap.mean == pytest.approx(0.06)
    back = stats.difference(worse, better)
    assert back is not None
    assert back.sure == -1


def test_a_difference_of_nothing_is_not_sure() -> None:
    rng = np.random.default_rng(5)
    gap = stats.difference(scores(rng, 3, 200, 0.5), scores(rng, 2, 200, 0.5))
    assert gap is not None
    assert gap.sure == 0
    assert gap.seeds == 2


def test_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="3 questions against 4"):
        stats.difference(np.zeros((1, 3)), np.zeros((1, 4)))
    with pytest.raises(ValueError, match=r"\(seeds, questions\)"):
        stats.over_seeds(np.zeros(3))


def test_rank_correlation() -> None:
    assert stats.rank_correlation([1, 10, 100], [0.1, 0.2, 0.3]) == pytest.approx(1)
    assert stats.rank_correlation([1, 10, 100], [3, 2, 1]) == pytest.approx(-1)
    assert stats.rank_correlation([1, 1, 2, 2], [1, 2, 1, 2]) == pytest.approx(0)
    assert math.isnan(stats.rank_correlation([16, 16], [0.1, 0.2]))


def test_a_rank_correlation_of_few_rows_may_be_chance() -> None:
    eight = list(range(8))
    assert stats.rank_chance(eight, eight) < 0.01
    assert stats.rank_chance(eight, [1, 0, 7, 2, 3, 6, 4, 5]) > 0.05  # 0.62
    assert stats.rank_chance([16, 16, 4, 16, 16, 16, 16, 16], eight) > 0.2  # one row differs: it says little


def test_one_lucky_batch_is_not_convergence() -> None:
    loss = [3.0] * 60
    loss[20] = 0.1
    assert stats.steps_to(loss, 1.0) is None
    assert stats.steps_to([3.0] * 30 + [0.5] * 30, 1.0) == 38  # the window of ten holds eight of the low ones


def test_curves_reach_a_loss_or_fail() -> None:
    assert stats.steps_to([4.0, 3.0, 2.0, 1.0], 2.0) == 3
    assert stats.steps_to([4.0, 3.0], 1.0) is None
    assert stats.failed([3.0, 2.0, 1.0]) is None
    assert stats.failed([1.0, 2.0, 3.0]) == "the loss ends at 3 and began at 1"
    assert stats.failed([1.0, math.nan]) == "the loss is not finite"
    assert stats.failed([]) == "the loss is not finite"
    assert stats.failed([2.0]) is None  # one step has no direction
