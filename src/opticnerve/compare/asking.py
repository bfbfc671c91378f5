"""Ways to ask a trained row that its recipe's own `evaluate` does not know: each gives systems, with their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opticnerve.data.dataset.load import fixed_sample, load_data
from opticnerve.evaluation.tasks import run_vqa
from opticnerve.inference.embeddings import Embedder, load_dual_encoder
from opticnerve.inference.load import load_model
from opticnerve.inference.predictors import LateFusion, VLMPredictor, load_classifier
from opticnerve.inference.zero_shot import ZeroShotPredictor
from opticnerve.recipe import EvaluateSpec
from opticnerve.types import Conversation

Found = dict[str, dict[str, Any]]


def late(ask: dict[str, Any], folder: Path, needs: Sequence[Path]) -> Found:
    """A late-fusion classifier by each rule of `ask["rules"]` (rule → system): one training, asked several times."""
    predictor = load_classifier(folder)
    found = {}
    for rule, system in ask["rules"].items():
        predictor.model.combine = rule
        found[system] = run_vqa(predictor.answers, _questions(ask), name=system, keep=0, run_dir=folder)
    return found


def zero_shot(ask: dict[str, Any], folder: Path, needs: Sequence[Path]) -> Found:
    """A dual encoder: the answer that lies nearest to the picture; the question is not read."""
    predictor = ZeroShotPredictor(Embedder(*load_dual_encoder(str(folder))))
    return {ask["system"]: _ask(predictor, ask, folder)}


def ensemble(ask: dict[str, Any], folder: Path, needs: Sequence[Path]) -> Found:
    """Late fusion of a classifier and a vision-language model that other rows trained."""
    token_sampler, speaker = needs
    predictor = LateFusion([load_classifier(token_sampler), VLMPredictor(*load_model(speaker))], combine="mean")
    return {ask["system"]: _ask(predictor, ask, folder)}


ASKS: dict[str, Callable[[dict[str, Any], Path, Sequence[Path]], Found]] = {
    "late": late,
    "zero_shot": zero_shot,
    "ensemble": ensemble,
}


def _ask(predictor: Any, ask: dict[str, Any], folder: Path) -> dict[str, Any]:
    choices: list[str] = ask["choices"]

    def generate(asked: list[Conversation]) -> list[str]:
        scores = [predictor.scores(c, choices) for c in asked]
        return [choices[row.index(max(row))] for row in scores]

    return run_vqa(generate, _questions(ask), name=ask["system"], keep=0, run_dir=folder)


def _questions(ask: dict[str, Any]) -> list[Conversation]:
    spec = EvaluateSpec(**ask["questions"])
    return fixed_sample(load_data(spec.data), spec.sample)
