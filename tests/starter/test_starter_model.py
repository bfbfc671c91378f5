"""The model that ships with the package, on real weights: it sees, and it still speaks as SmolLM2 does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from opticnerve.data.dataset.load import fixed_sample, load_data
from opticnerve.evaluation.tasks import run_vqa
from opticnerve.inference.generate import Answerer
from opticnerve.inference.load import load_model
from opticnerve.language.load import load_language
from opticnerve.recipe import DataSpec
from opticnerve.starter.demo import SHIPPED, shipped_model
from opticnerve.types import Conversation, ask

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "docs" / "images" / "example.png"


@pytest.fixture(scope="module")
def starter() -> tuple[Any, Any]:
    model, processor = load_model("starter")
    return model, processor


def test_it_names_what_is_in_a_picture_of_ours(starter: tuple[Any, Any]) -> None:
    questions = ["what shape is in the image?", "what color is the shape?", "is there a red shape?"]
    assert Answerer(*starter).answer([ask(q, EXAMPLE) for q in questions]) == ["circle", "teal", "no"]


def test_it_answers_held_out_questions(starter: tuple[Any, Any]) -> None:
    """99.8 % of all 9,673; of 100, ninety-seven leave room for another machine's rounding."""
    answerer = Answerer(*starter)
    asked = fixed_sample(load_data(DataSpec(path="starter/easy-vqa/test-questions")), 100)

    def generate(conversations: list[Conversation]) -> list[str]:
        return answerer.answer(conversations, max_new_tokens=8, batch_size=32)

    assert run_vqa(generate, asked, name="easy-vqa test")["accuracy"] >= 0.97


@pytest.mark.parametrize("name", SHIPPED)
def test_text_alone_meets_the_untouched_language_model(name: str) -> None:
    model, processor = load_model(name)
    bare = load_language("starter/smollm2-135m-instruct", dtype=torch.bfloat16).model.eval()
    words = processor(text="The capital of France is", return_tensors="pt").to(model.device)
    with torch.no_grad():
        theirs = bare(input_ids=words["input_ids"].cpu()).logits
        assert torch.equal(*tiny.words_of(model(**words).logits.cpu(), theirs))


def test_it_fits_in_ten_megabytes() -> None:
    assert sum(f.stat().st_size for f in shipped_model().glob("*.safetensors")) < 10e6
