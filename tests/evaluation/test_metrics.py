from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import refused
from opticnerve.evaluation import metrics


@pytest.mark.parametrize(
    ("said", "same"),
    [
        ("Blue.", "blue"), ("a  Circle", "circle"), ("The red one!", "red 1"), ("two", "2"), ("None", "0"),
        ("don't", "dont"), ("1,000", "1000"), ("3.5", "3.5"), ("U.S.", "us"), ("T-shirt", "t shirt"), ("A", "a"),
        ("?", "?"), ("", ""),
    ],
)  # fmt: skip
def test_normalisation(said: str, same: str) -> None:
    assert metrics.normalise_answer(said) == same


@given(st.text(max_size=30))
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = metrics.normalise_answer(text)
    assert metrics.normalise_answer(once) == metrics.normalise_answer(metrics.normalise_answer(once))


def test_exact_match_is_of_the_whole_answer() -> None:
    assert metrics.exact_match("Yes.", ["no", "yes"])
    assert not metrics.exact_match("yes it is", ["yes"])


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy_is_vqav2s(agreeing: int, accuracy: float) -> None:
    # The averages over ten leave-one-out subsets, as published with VQAv2.
    people = ["red"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert metrics.vqa_soft_accuracy("Red", people) == pytest.approx(accuracy)


def test_wilson_against_a_published_value() -> None:
    # 8 of 10: (0.4902, 0.9433), e.g. Brown, Cai and DasGupta's formula (2001) worked by hand.
    assert metrics.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert metrics.wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_mirrors(case: tuple[int, int]) -> None:
    k, n = case
    low, high = metrics.wilson_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1 and low < high
    assert metrics.wilson_interval(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_types_are_scored_apart_and_the_biggest_comes_first() -> None:
    got = metrics.accuracy_by_type([1, 0, 1, 1], ["color", "yes/no", "yes/no", "yes/no"])
    assert list(got) == ["yes/no", "color"]
    assert got["yes/no"]["accuracy"] == pytest.approx(2 / 3) and got["color"]["n"] == 1


def test_choice_rank_counts_ties_as_lost() -> None:
    got = metrics.choice_rank([[-1.0, -2.0, -3.0], [-2.0, -2.0, -3.0], [-9.0, -2.0, -3.0]])
    assert got["accuracy"] == pytest.approx(1 / 3) and got["mean_rank"] == pytest.approx(2) and got["chance"] == 1 / 3
    for bad, kind in (
        ([[-1.0]], "wrong-shape"), ([[-1.0, -2.0], [-1.0]], "wrong-shape"), ([[-1.0, math.nan]], "not-finite"),
        ([], "wrong-shape"),
    ):  # fmt: skip
        with refused(kind):
            metrics.choice_rank(bad)


REFERENCES = [
    ["a dog runs on the beach", "a brown dog runs by the sea"],
    ["two men ride a red bus to town"],
    ["a bowl of green soup"],
]


def test_caption_scores_prefer_the_right_captions() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("pycocoevalcap")
    right = ["A dog runs on the beach.", "Two men ride a red bus to town.", "A bowl of green soup."]
    assert metrics.bleu4(right, REFERENCES) == pytest.approx(1.0)
    assert metrics.bleu4(right[1:] + right[:1], REFERENCES) == 0
    assert metrics.cider(right, REFERENCES) > 5
    assert metrics.cider(right[1:] + right[:1], REFERENCES) < 0.5


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name}")

    monkeypatch.setattr(metrics.importlib, "import_module", absent)
    for score in (metrics.cider, metrics.bleu4):
        with refused("not-installed", "opticnerve[captions]"):
            score(["a", "b", "c"], REFERENCES)


def test_captions_without_references_are_refused() -> None:
    for predictions, references in (([], []), (["a"], [[]]), (["a"], [["b"], ["c"]])):
        with refused("wrong-shape", f"{len(predictions)} captions", f"{len(references)} pictures"):
            metrics.bleu4(predictions, references)
