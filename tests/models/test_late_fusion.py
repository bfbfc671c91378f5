"""Late fusion by numbers worked out by hand, and over predictors of any kind."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from errors import refused
from opticnerve.inference.predictors import LateFusion
from opticnerve.models.classifier.parts import combine
from opticnerve.types import Conversation, ask

CHOICES = ["red", "green", "blue"]


@dataclass
class Says:
    """A predictor with fixed scores, or with scores by question."""

    scores_: Sequence[float] = (1.0, 0.0, 0.0)
    by_question: dict[str, Sequence[float]] = field(default_factory=dict)

    def scores(self, conversation: Conversation, choices: Sequence[str]) -> list[float]:
        return list(self.by_question.get(conversation.messages[0].text, self.scores_))


def fused(rule: str, *rows: Sequence[float], **options: object) -> list[float]:
    return LateFusion([Says(r) for r in rows], rule, **options).scores(ask("what?"), CHOICES)  # type: ignore[arg-type]


def test_the_rules_by_hand() -> None:
    a, b = (0.6, 0.3, 0.1), (0.1, 0.3, 0.6)
    assert fused("mean", a, b) == pytest.approx([0.35, 0.3, 0.35])
    # The geometric mean favours what neither rules out.
    roots = [0.06**0.5, 0.09**0.5, 0.06**0.5]
    assert fused("product", a, b) == pytest.approx([r / sum(roots) for r in roots])
    assert fused("learned", a, b, weights=[1.0, 0.0]) == pytest.approx(list(a))
    # Two votes against one, however sure the one is.
    assert (
        fused("vote", (0.0, 0.0, 1.0), (0.4, 0.3, 0.3), (0.4, 0.3, 0.3)).index(
            max(fused("vote", (0.0, 0.0, 1.0), (0.4, 0.3, 0.3), (0.4, 0.3, 0.3)))
        )
        == 0
    )
    # One vote each: the mean decides.
    assert (
        fused("vote", (0.6, 0.4, 0.0), (0.0, 0.9, 0.1)).index(max(fused("vote", (0.6, 0.4, 0.0), (0.0, 0.9, 0.1)))) == 1
    )


@pytest.mark.parametrize("rule", ["mean", "vote", "product", "learned"])
def test_what_comes_out_are_probabilities_and_order_does_not_matter(rule: str) -> None:
    torch.manual_seed(0)
    chances_MBC = torch.rand(3, 5, 4).softmax(2)
    weights = torch.ones(3)
    out = combine(chances_MBC, rule, weights)  # type: ignore[arg-type]
    torch.testing.assert_close(out.sum(1), torch.ones(5))
    torch.testing.assert_close(combine(chances_MBC[[2, 0, 1]], rule, weights), out)  # type: ignore[arg-type]


def test_learned_weights_silence_a_predictor_that_guesses() -> None:
    rng = random.Random(0)
    questions, knows, guesses = [], Says(), Says()
    for i in range(60):
        right = rng.randrange(3)
        questions.append(ask(f"question {i}", answer=CHOICES[right]))
        knows.by_question[f"question {i}"] = [0.7 if k == right else 0.15 for k in range(3)]
        sure = rng.randrange(3)
        guesses.by_question[f"question {i}"] = [0.98 if k == sure else 0.01 for k in range(3)]

    def right_share(model: LateFusion) -> float:
        return sum(model.predict(q.prompt(), CHOICES) == q.answer for q in questions) / len(questions)

    fitted = LateFusion([knows, guesses]).fit(questions, CHOICES)
    assert fitted.weights is not None
    assert fitted.weights[1] < 0.05 * fitted.weights[0]
    assert right_share(fitted) == 1.0 > right_share(LateFusion([knows, guesses], "mean"))


def test_it_is_a_predictor_itself() -> None:
    inner = LateFusion([Says((0.5, 0.5, 0.0)), Says((0.5, 0.0, 0.5))])
    assert LateFusion([inner, inner]).scores(ask("what?"), CHOICES) == pytest.approx([0.5, 0.25, 0.25])


@pytest.mark.parametrize(
    ("act", "refusal"),
    [
        (lambda: LateFusion([]), ("empty",)),
        (
            lambda: LateFusion([Says()], "average"),  # type: ignore[arg-type]
            ("unknown-name", "combine", "mean, vote, product, learned", "'average'"),
        ),
        (lambda: LateFusion([Says()], "learned", [1.0, 2.0]), ("wrong-shape", "2 weights", "1 predictors")),
        (lambda: LateFusion([Says()], "learned", [-1.0]), ("out-of-range", "weights", "[-1.0]")),
        (lambda: fused("learned", (1, 0, 0)), ("missing-field", "learned", "weights")),
        (lambda: fused("mean", (0.5, 0.5)), ("wrong-shape", "Says", "2 scores", "3 choices")),
        (lambda: fused("mean", (float("nan"), 0, 1)), ("out-of-range", "Says", "[nan, 0, 1]")),
        (lambda: LateFusion([Says()]).scores(ask("what?"), ["red"]), ("out-of-range", "1 choices", "1 of them")),
        (lambda: LateFusion([Says()]).scores(ask("what?"), ["red", "red"]), ("out-of-range", "2 choices", "1 of them")),
        (lambda: LateFusion([Says()]).fit([], CHOICES), ("empty", "weights")),
        (lambda: LateFusion([Says()]).fit([ask("what?", answer="pink")], CHOICES), ("unknown-name", "'pink'")),
    ],
)
def test_bad_input(act: object, refusal: tuple[Any, ...]) -> None:
    with refused(*refusal):
        act()  # type: ignore[operator]
