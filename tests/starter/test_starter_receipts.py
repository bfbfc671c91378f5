"""The reader of receipts that ships with the package, on real weights and on receipts of the test side: it reads, and
what it answers hangs on the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opticnerve.inference.generate import Answerer
from opticnerve.inference.load import load_model
from opticnerve.starter.demo import shipped_model
from opticnerve.starter.receipts.write import receipt
from opticnerve.types import OpticNerveError, ask

pytestmark = pytest.mark.slow
IMAGES = Path(__file__).parents[2] / "docs" / "images"


@pytest.fixture(scope="module")
def reader() -> tuple[Any, Any]:
    model, processor = load_model("starter-receipts")
    return model, processor


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("receipt.jpg", "What is the total?", "$80.64"), ("receipt.jpg", "合計金額はいくらですか", "$80.64"),
        ("receipt.jpg", "What is the name of the shop?", "Maple Diner"),
        ("receipt-ja.jpg", "合計金額はいくらですか", "2,188円"), ("receipt-ja.jpg", "どこで買いましたか", "三浦スーパー"),
    ],
)  # fmt: skip
def test_it_reads_the_documents_examples(reader: tuple[Any, Any], name: str, question: str, answer: str) -> None:
    assert Answerer(*reader).answer([ask(question, IMAGES / name)]) == [answer]


def test_it_reads_totals_never_trained_on_and_another_receipt_has_another(reader: tuple[Any, Any]) -> None:
    try:
        asked = [
            (photo.image, questions[0]) for _, photo, questions, _ in (receipt(n, "test") for n in range(500, 510))
        ]
    except OpticNerveError as e:
        pytest.skip(f"the fonts cannot be fetched: {e}")
    answerer, pictures = Answerer(*reader), [picture for picture, _ in asked]
    right = []
    for shown in (pictures, pictures[2:] + pictures[:2]):  # (languages alternate by fives, conditions by ones)
        said = answerer.answer([ask(one.question, picture) for picture, (_, one) in zip(shown, asked, strict=True)])
        right.append(sum(answer == one.answer for answer, (_, one) in zip(said, asked, strict=True)))
    assert right[0] >= 5 and right[1] == 0


def test_it_fits_in_fifteen_megabytes() -> None:
    assert sum(f.stat().st_size for f in shipped_model("starter-receipts").glob("*.safetensors")) < 15e6
