"""Late fusion: separate predictors, and one answer out of their probabilities.

`combine` holds the rules (Kittler et al. 1998, On Combining Classifiers, section 2: mean, vote and product; weights
learned on held-out data are Wolpert's stacking, 1992). `LateFusion` applies them to any predictors that can say
`scores(conversation, choices)`: a vision-language model, a text-only one, a zero-shot dual encoder, a classifier, or
several of a kind, which makes an ensemble.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from opticnerve.types import Conversation, OpticNerveError

Combination = Literal["mean", "vote", "product", "learned"]
_LEAST = 1e-9  # a predictor that is sure must not silence all others in a product


class Predictor(Protocol):
    """What late fusion combines."""

    def scores(self, conversation: Conversation, choices: Sequence[str]) -> list[float]:
        """Probabilities of the choices as the answer, in their order."""
        ...


def combine(probabilities_MBC: Tensor, how: Combination, weights_M: Tensor | None = None) -> Tensor:
    """M predictors' probabilities of C choices for B questions → one row of probabilities for each, (B, C).

    - mean: their average.
    - vote: each predictor votes for its likeliest choice (of equal ones the first). The row is (votes + mean) /
      (M + 1): the mean breaks ties and never outweighs a vote.
    - product: what they say as if independent; the geometric mean, normalised.
    - learned: a product with weights, p ∝ Π p_m^(w_m), w ≥ 0.

    Raises:
        OpticNerveError: an unknown rule, or weights that do not fit.
    """
    if how not in get_args(Combination):
        raise OpticNerveError(f"combine is one of {', '.join(get_args(Combination))}, not {how!r}")
    count = len(probabilities_MBC)
    if how == "mean":
        return probabilities_MBC.mean(0)
    if how == "vote":
        votes_BC = F.one_hot(probabilities_MBC.argmax(2), probabilities_MBC.shape[2]).sum(0)
        return (votes_BC + probabilities_MBC.mean(0)) / (count + 1)
    if how == "product":
        weights_M = probabilities_MBC.new_full((count,), 1 / count)
    elif weights_M is None:
        raise OpticNerveError("combine: learned needs weights; fit them on held-out questions, or give them")
    logs_MBC = probabilities_MBC.clamp_min(_LEAST).log()
    return (weights_M[:, None, None] * logs_MBC).sum(0).softmax(1)


class LateFusion:
    """Several predictors as one.

    Args:
        predictors: anything with `scores(conversation, choices)`. combine: see `combine`.
        weights: for "learned", one for each predictor, none negative; or call `fit`.

    Raises:
        OpticNerveError: no predictors, or weights that do not fit.
    """

    def __init__(
        self, predictors: Sequence[Predictor], combine: Combination = "mean", weights: Sequence[float] | None = None
    ) -> None:
        if not predictors:
            raise OpticNerveError("late fusion of nothing; give at least one predictor")
        if combine not in get_args(Combination):
            raise OpticNerveError(f"combine is one of {', '.join(get_args(Combination))}, not {combine!r}")
        if weights is not None:
            _check_weights(weights, len(predictors))
        self.predictors, self.combine = list(predictors), combine
        self.weights = None if weights is None else list(weights)

    def scores(self, conversation: Conversation, choices: Sequence[str]) -> list[float]:
        """Probabilities of the choices, in their order."""
        found_M1C = self._asked([conversation], [choices])
        weights_M = None if self.weights is None else torch.tensor(self.weights, dtype=torch.float64)
        combined: list[float] = combine(found_M1C, self.combine, weights_M)[0].tolist()
        return combined

    def predict(self, conversation: Conversation, choices: Sequence[str]) -> str:
        """The likeliest choice."""
        scores = self.scores(conversation, choices)
        return choices[scores.index(max(scores))]

    def fit(self, conversations: Sequence[Conversation], choices: Sequence[str], *, steps: int = 200) -> LateFusion:
        """Learn the weights on questions that no predictor was trained on, by the likelihood of their answers.

        Raises:
            OpticNerveError: no questions, or an answer that is none of the choices.
        """
        place = {c: i for i, c in enumerate(choices)}
        answers = [c.answer for c in conversations]
        if not answers or any(a not in place for a in answers):
            wrong = next((a for a in answers if a not in place), None)
            raise OpticNerveError(
                "there is nothing to fit weights on" if not answers else f"the answer {wrong!r} is none of the choices"
            )
        found_MBC = self._asked(conversations, [choices] * len(conversations))
        targets_B = torch.tensor([place[str(a)] for a in answers])
        free_M = torch.full((len(found_MBC),), math.log(math.e - 1), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([free_M], max_iter=steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            combined_BC = combine(found_MBC, "learned", F.softplus(free_M))
            value = F.nll_loss(combined_BC.clamp_min(_LEAST).log(), targets_B)
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]
        self.weights, self.combine = F.softplus(free_M.detach()).tolist(), "learned"
        return self

    def _asked(self, conversations: Sequence[Conversation], choices: Sequence[Sequence[str]]) -> Tensor:
        rows = [
            [_checked(p, c, options) for c, options in zip(conversations, choices, strict=True)]
            for p in self.predictors
        ]
        return torch.tensor(rows, dtype=torch.float64)


def check_choices(choices: Sequence[str]) -> None:
    """Raise where there is nothing to choose between, or one choice stands twice."""
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise OpticNerveError(f"{len(choices)} choices, {len(set(choices))} of them different; give at least two")


def _checked(predictor: Predictor, conversation: Conversation, choices: Sequence[str]) -> list[float]:
    check_choices(choices)
    scores = list(predictor.scores(conversation, choices))
    name, where = type(predictor).__name__, conversation.where or conversation.id or "the question"
    if len(scores) != len(choices):
        raise OpticNerveError(f"{where}: {name} gave {len(scores)} scores for {len(choices)} choices")
    if not all(math.isfinite(s) and s >= 0 for s in scores) or not sum(scores) > 0:
        raise OpticNerveError(f"{where}: {name} gave no probabilities: {scores}")
    return [s / sum(scores) for s in scores]


def _check_weights(weights: Sequence[float], count: int) -> None:
    if len(weights) != count:
        raise OpticNerveError(f"{len(weights)} weights for {count} predictors")
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
        raise OpticNerveError(f"weights are finite, not negative, and not all zero; got {list(weights)}")
