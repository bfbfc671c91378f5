"""How sure a comparison is: intervals over seeds and questions, and differences on the same questions.

Two things vary between one training and the next: its seed, and the questions that happen to be asked. The bootstrap
(Efron & Tibshirani 1993, chapter 8) here resamples both: seeds with replacement, then questions with replacement, the
same questions for every seed and every row, for they were all asked the same. With few seeds their part is
underestimated (by (S - 1)/S in variance); with one seed the interval is over questions alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opticnerve.evaluation.metrics import wilson_interval

Array = NDArray[np.float64]

DRAWS = 2000
_AT_ONCE = 250  # draws whose counts of questions are held in memory at a time


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, over `seeds` trainings and `questions` questions."""

    mean: float
    low: float
    high: float
    seeds: int
    questions: int

    @property
    def sure(self) -> int:
        """Of a difference: 1 if surely above zero, -1 if surely below, 0 if the interval holds zero."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def over_seeds(scores_SQ: ArrayLike, *, seed: int = 0, draws: int = DRAWS) -> Estimate | None:
    """The mean of scores in [0, 1], of shape (seeds, questions), and its interval; None where there are none."""
    scores_SQ = _table(scores_SQ)
    seeds, questions = scores_SQ.shape
    if not scores_SQ.size:
        return None
    mean = float(scores_SQ.mean())
    if scores_SQ.min() == scores_SQ.max():
        # Resampling equal scores gives an interval of no width, which nobody should believe.
        low, high = wilson_interval(mean * questions, questions)
        return Estimate(mean, low, high, seeds, questions)
    rng = np.random.default_rng(seed)
    ends = _ends(_seed_means(scores_SQ, _counts(rng, questions, draws), rng))
    return Estimate(mean, *ends, seeds, questions)


def difference(first_SQ: ArrayLike, second_SQ: ArrayLike, *, seed: int = 0, draws: int = DRAWS) -> Estimate | None:
    """First minus second, (seeds, questions) each, paired by question; seeds, of which there may be more of one, are
    drawn for each by itself."""
    first_SQ, second_SQ = _table(first_SQ), _table(second_SQ)
    if first_SQ.shape[1] != second_SQ.shape[1]:
        raise ValueError(f"{first_SQ.shape[1]} questions against {second_SQ.shape[1]}; give both the same ones")
    if not first_SQ.size or not second_SQ.size:
        return None
    rng = np.random.default_rng(seed)
    counts = _counts(rng, first_SQ.shape[1], draws)
    gaps = _seed_means(first_SQ, counts, rng) - _seed_means(second_SQ, counts, rng)
    mean = float(first_SQ.mean() - second_SQ.mean())
    return Estimate(mean, *_ends(gaps), min(len(first_SQ), len(second_SQ)), first_SQ.shape[1])


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: from -1 to 1; NaN where one of the two does not vary."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return float("nan")
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def rank_chance(x: Sequence[float], y: Sequence[float], *, seed: int = 0, draws: int = DRAWS) -> float:
    """How often a rank correlation as strong comes about when `y` is shuffled: the p of a permutation test."""
    found, rng = abs(rank_correlation(x, y)), np.random.default_rng(seed)
    shuffled = (abs(rank_correlation(x, rng.permutation(np.asarray(y)).tolist())) for _ in range(draws))
    return (1 + sum(s >= found - 1e-9 for s in shuffled)) / (1 + draws)


def window(steps: int) -> int:
    """Steps that a loss is averaged over: one batch is luck; a quarter of a short run, ten steps of a longer one."""
    return max(1, min(10, steps // 4))


def running(loss: Sequence[float]) -> Array:
    """The mean over each full window: (steps - window + 1,), the first of them at step `window`."""
    values = np.asarray(loss, dtype=float)
    return np.lib.stride_tricks.sliding_window_view(values, window(len(values))).mean(-1)  # type: ignore[no-any-return]


def steps_to(loss: Sequence[float], threshold: float) -> int | None:
    """The first step (from 1) at which the loss, averaged over the window that ends there, is at the threshold."""
    below = np.flatnonzero(running(loss) <= threshold)
    return int(below[0]) + window(len(loss)) if len(below) else None


def failed(loss: Sequence[float]) -> str | None:
    """Why a loss curve counts as a failed training, if it does: it is not finite, or ends no lower than it began."""
    values = np.asarray(loss, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        return "the loss is not finite"
    tenth = max(1, len(values) // 10)
    first, last = values[:tenth].mean(), values[-tenth:].mean()
    if len(values) > 1 and last >= first:
        return f"the loss ends at {last:.3g} and began at {first:.3g}"
    return None


def _table(scores: ArrayLike) -> Array:
    table = np.asarray(scores, dtype=float)
    if table.ndim != 2:
        raise ValueError(f"scores want the shape (seeds, questions), not {table.shape}")
    return table


def _counts(rng: np.random.Generator, questions: int, draws: int) -> Array:
    """How often each question is in each draw: (draws, questions), as shares of the draw."""
    equal_Q = np.full(questions, 1 / questions)
    sizes = [min(_AT_ONCE, draws - start) for start in range(0, draws, _AT_ONCE)]
    chunks = [rng.multinomial(questions, equal_Q, size=size).astype(np.float32) for size in sizes]
    return np.concatenate(chunks) / questions


def _seed_means(scores_SQ: Array, counts_BQ: Array, rng: np.random.Generator) -> Array:
    """(B,): of each draw, the mean over seeds drawn with replacement."""
    by_seed_BS = counts_BQ @ scores_SQ.T
    picks_BS = rng.integers(0, len(scores_SQ), size=by_seed_BS.shape)
    return np.take_along_axis(by_seed_BS, picks_BS, axis=1).mean(1)  # type: ignore[no-any-return]


def _ends(values: Array) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _ranks(values: Sequence[float]) -> Array:
    """Ranks from 0; equal values share the mean of theirs."""
    array = np.asarray(values, dtype=float)
    return np.array([((array < v).sum() + (array <= v).sum() - 1) / 2 for v in array], dtype=float)
