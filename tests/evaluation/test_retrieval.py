"""R@K over many-to-many pairs, against chance; zero-shot accuracy over a closed set."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import pytest

import tiny
from errors import refused
from opticnerve.evaluation.retrieval import ranks, recalls, run_retrieval, run_zero_shot
from opticnerve.types import Conversation, DataError, ask


class Oracle:
    """Knows the directions of pictures (by their red value) and of texts (by their number)."""

    logit_scale = 10.0

    def __init__(self, confused: Sequence[int] = (), size: int = 40) -> None:
        self.directions = np.eye(size, dtype=np.float32)
        self.confused = set(confused)

    def images(self, sources: Sequence[Any], progress: Any = None) -> Any:
        if progress is not None:
            progress(len(sources), len(sources))
        numbers = [s.getpixel((0, 0))[0] for s in sources]
        return self.directions[[n + 1 if n in self.confused else n for n in numbers]]

    def texts(self, texts: Sequence[str], progress: Any = None) -> Any:
        return self.directions[[int("".join(filter(str.isdigit, t))) for t in texts]]


def pair(number: int, caption: str | None = None) -> Conversation:
    return ask("what is it?", PIL.Image.new("RGB", (2, 2), (number, 0, 0)), answer=caption or f"thing {number}")


# -- ranks ----------------------------------------------------------------------------------------------------------


def test_ranks_agree_with_sorting() -> None:
    rng, token_sampler = np.random.default_rng(0), random.Random(0)
    queries, found = (rng.standard_normal((n, 6)).astype(np.float32) for n in (30, 17))
    right = [token_sampler.sample(range(17), token_sampler.randint(1, 4)) for _ in range(30)]
    for q, rank in enumerate(ranks(queries, found, right)):
        order = np.argsort(-(found @ queries[q])).tolist()
        assert rank == 1 + min(order.index(r) for r in right[q])


def test_a_tie_is_no_win_but_two_right_ones_do_not_hinder_each_other() -> None:
    query, same = np.array([[1.0, 0.0]], dtype=np.float32), np.ones((3, 2), dtype=np.float32)
    assert ranks(query, same, [[0]]).tolist() == [3]
    assert ranks(query, same, [[0, 2]]).tolist() == [2]
    assert ranks(query, same, [[0, 1, 2]]).tolist() == [1]


def test_a_query_without_anything_right() -> None:
    with refused("missing-field", "2 queries, 1 of them"):
        ranks(np.ones((2, 2), dtype=np.float32), np.ones((3, 2), dtype=np.float32), [[1], []])


def test_recalls_and_chance() -> None:
    right = [[0], [1, 2]]
    entry = recalls(np.array([1, 6]), right, 20)
    assert [entry[f"R@{k}"]["accuracy"] for k in (1, 5, 10)] == [0.5, 0.5, 1.0]
    assert entry["median_rank"] == 3.5
    # By counting: one of two right ones among the first k of 20.
    for k in (1, 5, 10):
        two = 1 - (20 - k) * (19 - k) / (20 * 19)
        assert entry[f"R@{k}"]["chance"] == pytest.approx((k / 20 + two) / 2)
    low, high = entry["R@1"]["ci95"]
    assert low < 0.5 < high
    assert "R@10" not in recalls(np.array([1, 2]), right, 10)  # among ten, R@10 is always 1


# -- over conversations ---------------------------------------------------------------------------------------------


def test_several_captions_of_a_picture_and_several_pictures_of_a_caption() -> None:
    talks = [pair(n) for n in range(12)]
    talks += [pair(3, "also 3"), pair(3, "and 3"), pair(20, "thing 3")]
    entry = run_retrieval(Oracle(), talks, name="things")
    assert entry["image_to_text"]["n"] == 13
    assert entry["image_to_text"]["candidates"] == 14
    assert entry["text_to_image"]["n"] == 14
    # Only the picture 20, which points elsewhere, does not find "thing 3"; that text finds the picture 3.
    assert entry["image_to_text"]["R@1"]["accuracy"] == pytest.approx(12 / 13)
    assert entry["text_to_image"]["R@1"]["accuracy"] == 1.0
    assert entry["n"] == 15


def test_confusion_shows() -> None:
    entry = run_retrieval(Oracle(confused=[4]), [pair(n) for n in range(12)], name="things")
    assert entry["image_to_text"]["R@1"]["accuracy"] == pytest.approx(11 / 12)
    # Two pictures lie at "thing 5", a tie; none at "thing 4".
    assert entry["text_to_image"]["R@1"]["accuracy"] == pytest.approx(10 / 12)


def test_too_little_to_search() -> None:
    with refused("out-of-range", "1 pictures and 2 captions"):
        run_retrieval(Oracle(), [pair(3), pair(3, "also 3")], name="")
    with refused("no-pair", "0 pictures and 1 answers", error=DataError):
        run_retrieval(Oracle(), [ask("what?", answer="7"), pair(1)], name="")


def test_zero_shot_accuracy() -> None:
    talks = [pair(n, f"{n % 4}") for n in range(4)] + [pair(9, "1")]
    seen: list[tuple[int, int]] = []
    entry = run_zero_shot(Oracle(), talks, name="digits", progress=lambda a, b: seen.append((a, b)))
    assert (entry["n"], entry["accuracy"], entry["classes"], entry["chance"]) == (5, 0.8, 4, 0.25)
    assert seen == [(5, 5)]
    more = run_zero_shot(Oracle(), talks, name="digits", classes=[str(n) for n in range(20)])
    assert more["chance"] == 0.05


def test_answers_outside_the_closed_set_and_one_class() -> None:
    talks = [pair(1, "1"), pair(2, "2"), pair(3, "3")]
    with refused("unknown-name", "1 answers", "2 classes", "'3'"):
        run_zero_shot(Oracle(), talks, name="", classes=["1", "2"])
    with refused("out-of-range", "'1'"):
        run_zero_shot(Oracle(), talks[:1], name="")


def test_files_with_equal_content_are_one_picture(tmp_path: Any) -> None:
    for name in ("a", "b"):
        tiny.picture(1).save(tmp_path / f"{name}.png")
    tiny.picture(2).save(tmp_path / "c.png")
    talks = [ask("?", tmp_path / f"{n}.png", answer=f"{i}") for i, n in enumerate("abc")]

    class Blind(Oracle):
        def images(self, sources: Sequence[Any], progress: Any = None) -> Any:
            return self.directions[: len(sources)]

    entry = run_retrieval(Blind(), talks, name="")
    assert entry["image_to_text"]["n"] == 2
