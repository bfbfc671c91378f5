"""Made-up receipts: sums are right, answers stand where their boxes are, and nothing of the test side is trained on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opticnerve.data.dataset.load import STARTER, load_data
from opticnerve.recipe import DataSpec
from opticnerve.recipe.data import BoxSpec
from opticnerve.starter.receipts import prepare, write
from opticnerve.starter.receipts.goods import LOCALES, Locale, Side, for_testing, purchase
from opticnerve.starter.receipts.paper import LAYOUTS, families
from opticnerve.starter.receipts.photo import STYLES, photograph
from opticnerve.starter.receipts.questions import YES_NO
from opticnerve.starter.receipts.write import receipt
from opticnerve.types import OpticNerveError

SIDES: tuple[Side, Side] = ("train", "test")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    try:
        return prepare(tmp_path_factory.mktemp("receipts"), counts={"train": 20, "test": 20})
    except OpticNerveError as e:
        pytest.skip(f"the fonts cannot be fetched: {e}")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("locale", LOCALES)
@pytest.mark.parametrize("side", SIDES)
def test_sums_are_right(side: Side, locale: Locale) -> None:
    for seed in range(200):
        bought = purchase(random.Random(seed), side, locale)
        assert for_testing(bought.shop) == (side == "test")
        assert bought.subtotal == sum(i.price * i.quantity for i in bought.items)
        assert (
            0 < bought.total == bought.subtotal - bought.discount + sum(t.amount for t in bought.taxes if not t.inside)
        )
        assert bought.paid is None or bought.paid >= bought.total
        net = bought.subtotal - bought.discount
        assert len(bought.taxes) < 3 and sum(t.amount for t in bought.taxes) <= 0.2 * net
        assert len({i.name for i in bought.items}) == len(bought.items)


def test_tax_is_rounded_down_on_what_it_is_due_on() -> None:
    bought = next(
        b for seed in range(100)
        if len((b := purchase(random.Random(seed), "train", "ja")).taxes) == 2 and not b.taxes[0].inside and not b.discount
    )  # fmt: skip
    low, high = (sum(i.amount for i in bought.items if i.reduced == reduced) for reduced in (True, False))
    assert [t.amount for t in bought.taxes] == [low * 8 // 100, high * 10 // 100]


def test_layouts_and_fonts_are_apart() -> None:
    for choice, values in LAYOUTS["train"].items():
        assert not set(values) & set(LAYOUTS["test"][choice])
    for locale in LOCALES:
        assert not set(families("train", locale)) & set(families("test", locale))


def test_a_number_is_the_same_receipt_every_time(prepared: dict[str, Path]) -> None:
    (paper, photo, asked, about), again = receipt(7, "train"), receipt(7, "train")
    assert (paper.words, asked, about) == (again[0].words, again[2], again[3])
    assert photo.image.tobytes() == again[1].image.tobytes()
    assert photo.image.tobytes() != receipt(7, "test")[1].image.tobytes()


@pytest.mark.parametrize("style", STYLES)
def test_boxes_follow_their_words_through_every_bend(style: str) -> None:
    sheet = np.full((600, 360), 255, dtype=np.uint8)
    box = (200, 400, 260, 420)
    sheet[box[1] : box[3], box[0] : box[2]] = 0
    for seed in range(4):
        photo = photograph(random.Random(seed), Image.fromarray(sheet), style)
        left, top, right, bottom = photo.box(box)
        grey = np.asarray(photo.image.convert("L"), dtype=float)
        inside = grey[round(top) + 2 : round(bottom) - 2, round(left) + 2 : round(right) - 2]
        # The block is the darkest thing: its middle is dark, and just outside its box nothing is.
        middle = grey[round((top + bottom) / 2), round((left + right) / 2)]
        around = np.concatenate([grey[round(top) - 5, round(left) : round(right)], grey[round(bottom) + 5, round(left) : round(right)]])  # fmt: skip
        assert middle < np.median(around) - 30
        assert inside.mean() < np.median(around) - 20


def test_files(prepared: dict[str, Path]) -> None:
    for side in SIDES:
        rows = rows_of(prepared[side])
        assert len({r["image"] for r in rows}) == 20 and len({r["id"] for r in rows}) == len(rows)
        assert {r["locale"] for r in rows} == set(LOCALES) and {r["style"] for r in rows} == set(STYLES)
        said = [r["answer"] for r in rows if r["type"] == "bought"]
        for yes, no in YES_NO.values():
            assert said.count(yes) == said.count(no) > 0
        for row in rows:
            with Image.open(prepared["media"] / row["image"]) as image:
                assert max(image.size) <= 1200 and min(image.size) >= 250
                if row["box"] is not None:
                    left, top, right, bottom = row["box"]
                    assert 0 <= left < right <= image.width and 0 <= top < bottom <= image.height
                assert (row["box"] is None) == (
                    row["type"] == "count" or row["answer"] in {n for _, n in YES_NO.values()}
                )


def test_the_total_is_asked_of_each_and_its_box_is_alone_where_two_amounts_are_the_same() -> None:
    for number in range(20):
        paper, _, asked, _ = receipt(number, "train")
        totals = [a for a in asked if a.type == "total"]
        assert len(totals) == 1 and totals[0].answer == paper.facts["total"]
        word = next(w for w in paper.words if w.fact == "total")
        assert word.text in totals[0].answer and totals[0].box is not None and totals[0].box[1] == word.box[1]


def test_transcriptions_are_what_is_printed(prepared: dict[str, Path]) -> None:
    whole = {r["image"]: r["answer"].split("\n") for r in rows_of(prepared["whole"])}
    assert len(whole) == 20
    for kind in ("lines", "regions"):
        for row in rows_of(prepared[kind]):
            printed = whole[row["image"].split("-")[0] + ".jpg"]
            lines = row["answer"].split("\n")
            assert any(printed[n : n + len(lines)] == lines for n in range(len(printed)))
            with Image.open(prepared["media"] / row["image"]) as image:
                assert image.height < 60 * len(lines)


def test_characters_are_the_words_letter_by_letter() -> None:
    for number in range(10):
        paper, *_ = receipt(number, "train")
        for word in paper.words:
            characters = list(word.characters())
            assert "".join(character for character, _ in characters) == word.text
            lefts, rights = ([box[side] for _, box in characters] for side in (0, 2))
            assert lefts == sorted(lefts) and lefts[1:] == rights[:-1]
            wide = word.box[2] - word.box[0]
            assert abs((rights[-1] - lefts[0]) - wide) < 0.25 * wide + 6


def test_a_second_call_draws_nothing(prepared: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "_one", None)
    assert prepare(prepared["media"].parent, counts={"train": 20, "test": 20}) == prepared


def test_it_reads_as_training_data(prepared: dict[str, Path]) -> None:
    keys = {key for name, (module, key) in STARTER.items() if module == "receipts"}
    assert keys == set(prepared) - {"media"}
    for key in keys:
        boxes = BoxSpec() if key == "characters" else None
        spec = DataSpec(path=str(prepared[key]), media=str(prepared["media"]), boxes=boxes)
        samples = load_data(spec)
        assert len(samples) == len(rows_of(prepared[key]))
        assert samples[0].messages[-1].role == "assistant"
