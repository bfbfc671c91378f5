"""Whatever can say `scores(conversation, choices)`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from errors import refused
from opticnerve.inference.likelihood import answer_scores
from opticnerve.inference.predictors import (
    ClassifierPredictor,
    LateFusion,
    TextOnlyPredictor,
    VLMPredictor,
    load_classifier,
)
from opticnerve.models.classifier.build import ClassifierDock, classifier
from opticnerve.models.vlm.build import Dock
from opticnerve.types import DataError, ask

pytestmark = pytest.mark.usefixtures("private_cache")
CHOICES = ["yes", "no", "red"]


@pytest.fixture
def token_sampler(bert_folder: str, vision_folder: Callable[..., str]) -> ClassifierDock:
    vision_encoder = {"type": "hf_vision", "name": vision_folder("siglip_vision_model")}
    return classifier(
        vision_encoder, bert_folder, timing="intermediate", answers=["no", "red", "yes"], width=16, heads=2, depth=1
    )


def test_a_vlm_scores_by_the_probability_of_the_whole_answer(docked: Callable[..., Dock]) -> None:
    dock = docked()
    question = ask("is it red?", tiny.picture(0))
    scores = VLMPredictor(dock.model, dock.processor).scores(question, CHOICES)
    alone = [answer_scores(dock.model, dock.processor, question, [c], over="sum")[0] for c in CHOICES]
    shares = [math.exp(a) for a in alone]
    assert scores == pytest.approx([s / sum(shares) for s in shares], rel=1e-3)
    assert VLMPredictor(dock.model, dock.processor).scores(question, CHOICES[::-1]) == pytest.approx(
        scores[::-1], rel=1e-3
    )


def test_text_only_does_not_look(docked: Callable[..., Dock]) -> None:
    dock = docked()
    blind, sees = TextOnlyPredictor(dock.model, dock.processor), VLMPredictor(dock.model, dock.processor)
    a, b = (ask("is it red?", tiny.picture(i)) for i in range(2))
    assert blind.scores(a, CHOICES) == blind.scores(b, CHOICES)
    assert sees.scores(a, CHOICES) != sees.scores(b, CHOICES)


def test_a_classifier_alone_in_a_batch_and_loaded(token_sampler: ClassifierDock, tmp_path: Path) -> None:
    predictor = ClassifierPredictor(*token_sampler, batch_size=2)
    tiny.picture(7).save(tmp_path / "a.png")
    questions = [ask(f"is it {w}?", tiny.picture(i % 2)) for i, w in enumerate(["red", "blue", "a very big circle"])]
    questions += [ask("what?", tmp_path / "a.png"), ask("which?", tmp_path / "a.png")]
    together = predictor.probabilities(questions)
    for row, question in zip(together, questions, strict=True):
        torch.testing.assert_close(predictor.probabilities([question])[0], row, rtol=1e-4, atol=1e-6)
    assert predictor.answers(questions) == [["no", "red", "yes"][i] for i in together.argmax(1)]
    few = predictor.scores(questions[0], ["yes", "NO"])
    assert few == pytest.approx((together[0, [2, 0]] / together[0, [2, 0]].sum()).tolist(), rel=1e-4)
    token_sampler.save(tmp_path / "kept", [])
    assert load_classifier(tmp_path / "kept", device="cpu").answers(questions) == predictor.answers(questions)


def test_pictures_that_do_not_fit_in_memory_together_are_seen_in_turns(
    token_sampler: ClassifierDock, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = ClassifierPredictor(*token_sampler, batch_size=1)
    pictures = [tiny.picture(i) for i in range(3)]
    questions = [ask("is it red?", pictures[i % 3]) for i in range(5)]
    together = predictor.probabilities(questions)
    shown: list[int] = []
    encode = token_sampler.model.image.encode
    monkeypatch.setattr(token_sampler.model.image, "encode", lambda pixels: shown.append(len(pixels)) or encode(pixels))
    assert torch.equal(predictor.probabilities(questions), together)
    assert sum(shown) == 3, "a picture of several questions is seen once"
    vision_encoder = token_sampler.model.image.encoder
    monkeypatch.setattr(
        "opticnerve.inference.predictors._NUMBERS", 2 * vision_encoder.num_tokens * vision_encoder.hidden_size
    )
    shown.clear()
    assert torch.equal(predictor.probabilities(questions), together)
    assert sum(shown) == 5  # two questions at a time: pictures 0 and 1, 2 and 0, 1


def test_kinds_of_models_together(docked: Callable[..., Dock], token_sampler: ClassifierDock) -> None:
    dock = docked()
    predictors: list[Any] = [VLMPredictor(dock.model, dock.processor), ClassifierPredictor(*token_sampler)]
    question = ask("is it red?", tiny.picture(0))
    apart = [p.scores(question, CHOICES) for p in predictors]
    assert LateFusion(predictors).scores(question, CHOICES) == pytest.approx(
        [sum(s) / 2 for s in zip(*apart, strict=True)]
    )


def test_bad_input(token_sampler: ClassifierDock, docked: Callable[..., Dock]) -> None:
    predictor, question = ClassifierPredictor(*token_sampler), ask("is it red?", tiny.picture(0))
    with refused("unknown-name", "'yess'", 3, "'yes'"):
        predictor.scores(question, ["yess", "no"])
    with refused("out-of-range", "1 choices"):
        predictor.scores(question, ["yes"])
    with refused("conflict", "'yes', 'YES'"):
        predictor.scores(question, ["yes", "YES"])
    with refused("no-question", "0 pictures and 1 questions", error=DataError):
        predictor.answers([ask("is it red?")])
    with refused("empty", "questions"):
        predictor.answers([])
    dock = docked()
    with refused("out-of-range", "2 choices, 1 of them"):
        VLMPredictor(dock.model, dock.processor).scores(question, ["yes", "yes"])
