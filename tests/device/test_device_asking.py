"""Answers, evaluation and the server on a pretended CUDA device: no mixed devices, and the CPU's words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from opticnerve.evaluation.evaluate import evaluate_model
from opticnerve.inference.generate import Answerer
from opticnerve.inference.likelihood import answer_scores
from opticnerve.models.vlm.build import Dock
from opticnerve.recipe import DataSpec, EvaluateSpec
from opticnerve.types import ask
from pretend_device import pretended

pytestmark = pytest.mark.usefixtures("private_cache")
CROSS = {"type": "cross_attention", "every": 1, "heads": 2}
ASKED = [ask("what?", tiny.picture(0)), ask("and this one here?", tiny.picture(1), tiny.picture(2)), ask("words")]
DOCKS: dict[str, dict[str, Any]] = {
    "spliced": {}, "tiled": {"tiling": {"type": "anyres"}}, "cross-attention": {"fusion": CROSS},
    "an adapter that steps aside": {}, "own shapes": {"vision": tiny.native_vision},
}  # fmt: skip


@pytest.fixture(params=DOCKS)
def dock(request: pytest.FixtureRequest, docked: Callable[..., Dock]) -> Dock:
    options = dict(DOCKS[request.param])
    vision = options.pop("vision", lambda: None)()
    made = docked("llama", *([] if vision is None else [vision]), **options)
    if "adapter" in request.param:
        made.model.give_lora({"rank": 2, "when": "media"})
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers(dock: Dock, dtype: torch.dtype) -> None:
    dock.model.to(dtype)
    here = Answerer(dock.model, dock.processor).answer(ASKED, max_new_tokens=6)
    with pretended():
        answerer = Answerer(dock.model.to("cuda"), dock.processor)
        assert answerer.answer(ASKED, max_new_tokens=6) == here
        assert "".join(answerer.stream(ASKED[0], max_new_tokens=6)) == here[0]
        list(answerer.stream(ASKED[1], max_new_tokens=6, temperature=1.0, top_p=0.9, seed=1))
        assert len(answer_scores(dock.model, dock.processor, ASKED[0], ["yes", "no"])) == 2
        dock.model.to("cpu")


def test_evaluation(dock: Dock, tmp_path: Path) -> None:
    tiny.save_questions(tmp_path)
    asked = [
        EvaluateSpec(name="held out", data=DataSpec(path=str(tmp_path / "questions.jsonl"), limit=4), max_new_tokens=3)
    ]
    here = evaluate_model(dock.model, dock.processor, asked)["tasks"]
    with pretended():
        there = evaluate_model(dock.model.to("cuda"), dock.processor, asked)["tasks"]
        dock.model.to("cpu")
    assert [t["accuracy"] for t in there] == [t["accuracy"] for t in here]


def test_a_token_waits_at_most_twice(docked: Callable[..., Dock]) -> None:
    """For its number, which the tokenizer turns into words, and for whether all rows have ended."""
    dock, counted = docked("llama"), {}
    for count in (4, 8):
        with pretended() as device:
            answerer = Answerer(dock.model.to("cuda"), dock.processor)
            answerer.answer(ASKED[:2], max_new_tokens=2)
            device.reset()
            answerer.answer(ASKED[:2], max_new_tokens=count)
            counted[count] = device.waits.copy()
            dock.model.to("cpu")
    assert (counted[8] - counted[4]).total() <= 2 * 4, counted[8] - counted[4]
