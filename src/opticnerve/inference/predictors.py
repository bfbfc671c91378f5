"""Predictors: `scores(conversation, choices)`, whatever stands behind it. What `LateFusion` combines.

(The zero-shot predictor of a dual encoder is `zero_shot.ZeroShotPredictor`.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import singledispatch
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from opticnerve.data.collators.classification import question_of
from opticnerve.data.media.transform import open_for
from opticnerve.inference.generate import Answerer
from opticnerve.inference.likelihood import answer_scores
from opticnerve.inference.load import load_any
from opticnerve.models.checkpoint.source import resolve
from opticnerve.models.classifier.modeling import FusionClassifier
from opticnerve.models.classifier.parts import LEAST, Combination, combine
from opticnerve.models.classifier.processing import FusionClassifierProcessor
from opticnerve.models.family import family_of
from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.processing import OpticNerveProcessor
from opticnerve.types import Conversation, Features, Message, OpticNerveError, TextPart

# Questions, and numbers of features (1 GiB in float32), whose pictures are held at a time.
_QUESTIONS, _NUMBERS = 2048, 2**28


class Predictor(Protocol):
    """What late fusion combines."""

    def scores(self, conversation: Conversation, choices: Sequence[str]) -> list[float]:
        """Probabilities of the choices as the answer, in their order."""
        ...


class VLMPredictor:
    """A docked language model, by the likelihood of each choice as its answer.

    The sum of an answer's log-probabilities, not their mean: it is the probability that the model says just this and
    ends there, so the choices' shares are what it would say if it could say nothing else.
    """

    def __init__(self, model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> None:
        self.model, self.processor = model, processor

    def scores(self, conversation: Conversation, choices: Sequence[str]) -> list[float]:
        """Probabilities of the choices, in their order."""
        check_choices(choices)
        logs = answer_scores(self.model, self.processor, conversation, choices, over="sum")
        shares: list[float] = torch.tensor(logs, dtype=torch.float64).softmax(0).tolist()
        return shares


class TextOnlyPredictor(VLMPredictor):
    """The same with the pictures and sounds left out: what the question alone gives away."""

    def scores(self, conversation: Conversation, choices: Sequence[str]) -> list[float]:
        """Probabilities of the choices, in their order."""
        messages = tuple(
            Message(m.role, tuple(p for p in m.parts if isinstance(p, TextPart))) for m in conversation.messages
        )
        return super().scores(replace(conversation, messages=messages), choices)


class ClassifierPredictor:
    """A `FusionClassifier` with its processor.

    Args: model, processor: as from `classifier(…)`. batch_size: questions, or pictures, at a time.
    """

    def __init__(self, model: FusionClassifier, processor: FusionClassifierProcessor, *, batch_size: int = 64) -> None:
        self.model, self.processor, self.batch_size = model, processor, batch_size

    def scores(self, conversation: Conversation, choices: Sequence[str]) -> list[float]:
        """Probabilities of the choices, in their order; their shares add up to 1, whatever the other answers get.

        Raises:
            OpticNerveError: a choice that the classifier does not know, or two that are one answer to it.
        """
        check_choices(choices)
        places = [self.processor.place_of(c) for c in choices]
        if len(set(places)) < len(places):
            raise OpticNerveError(
                f"{', '.join(map(repr, choices))}: two of these are one answer to the classifier", kind="conflict"
            )
        row_C = self.probabilities([conversation])[0, places]
        shares: list[float] = (row_C / row_C.sum()).tolist()
        return shares

    def answers(self, conversations: Sequence[Conversation]) -> list[str]:
        """The likeliest answer to each question."""
        return [self.processor.answers[i] for i in self.probabilities(conversations).argmax(1).tolist()]

    @torch.inference_mode()
    def probabilities(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """(questions, answers), float64. A picture that many questions are about is seen once."""
        if not conversations:
            raise OpticNerveError("there is nothing to ask: the list of questions is empty", kind="empty")
        self.model.eval()  # type: ignore[no-untyped-call]
        found, most = [], self._most()
        for start in range(0, len(conversations), most):
            chunk = conversations[start : start + most]
            questions = [question_of(c) for c in chunk]
            pictures = {_key(c): (c.images[0].source, c.where or c.id) for c in chunk}
            place = {key: i for i, key in enumerate(pictures)}
            seen = self._see(list(pictures.values()))
            for first in range(0, len(chunk), self.batch_size):
                part = slice(first, first + self.batch_size)
                batch = self.processor(text=questions[part], return_tensors="pt").to(self.model.device)
                rows = [place[_key(c)] for c in chunk[part]]
                if isinstance(seen, Features):
                    media: dict[str, Any] = {"image_features": Features(seen.tokens_BND[rows], seen.mask_BN[rows])}
                else:
                    media = {"pixel_values": seen[rows]}
                logits_BA = self.model(batch["input_ids"], batch["attention_mask"], **media).logits
                found.append(logits_BA.double().softmax(1).cpu())
        return torch.cat(found)

    def _most(self) -> int:
        """Questions at a time, so that what is seen of their pictures fits in memory."""
        vision_encoder = self.model.image
        each = (
            3 * self.model.classifier.pixels**2
            if vision_encoder is None
            else vision_encoder.encoder.num_tokens * vision_encoder.encoder.hidden_size
        )
        count: int = max(self.batch_size, min(_QUESTIONS, _NUMBERS // each))
        return count

    def _see(self, pictures: list[tuple[Any, str]]) -> Any:
        """Features of the pictures; their pixels for early fusion, which has no vision encoder."""
        seen = []
        for start in range(0, len(pictures), self.batch_size):
            prepare, some = self.processor.image_processor, pictures[start : start + self.batch_size]
            opened = [open_for(prepare, s, where=where) for s, where in some]
            pixels = prepare(opened, return_tensors="pt")["pixel_values"]
            seen.append(pixels.to(self.model.device) if self.model.image is None else self.model.image.encode(pixels))
        if self.model.image is None:
            return torch.cat(seen)
        return Features(torch.cat([f.tokens_BND for f in seen]), torch.cat([f.mask_BN for f in seen]))


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
            raise OpticNerveError("late fusion of nothing; give at least one predictor", kind="empty")
        if combine not in get_args(Combination):
            raise OpticNerveError(
                f"combine is one of {', '.join(get_args(Combination))}, not {combine!r}", kind="unknown-name"
            )
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
        if not answers:
            raise OpticNerveError("there is nothing to fit weights on", kind="empty")
        if wrong := [a for a in answers if a not in place]:
            raise OpticNerveError(f"the answer {wrong[0]!r} is none of the choices", kind="unknown-name")
        found_MBC = self._asked(conversations, [choices] * len(conversations))
        targets_B = torch.tensor([place[str(a)] for a in answers])
        free_M = torch.full((len(found_MBC),), math.log(math.e - 1), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([free_M], max_iter=steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            combined_BC = combine(found_MBC, "learned", F.softplus(free_M))
            value = F.nll_loss(combined_BC.clamp_min(LEAST).log(), targets_B)
            value.backward()
            return value

        optimizer.step(loss)
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
        raise OpticNerveError(
            f"{len(choices)} choices, {len(set(choices))} of them different; give at least two", kind="out-of-range"
        )


def _checked(predictor: Predictor, conversation: Conversation, choices: Sequence[str]) -> list[float]:
    check_choices(choices)
    scores = list(predictor.scores(conversation, choices))
    name, where = type(predictor).__name__, conversation.where or conversation.id or "the question"
    if len(scores) != len(choices):
        raise OpticNerveError(
            f"{where}: {name} gave {len(scores)} scores for {len(choices)} choices", kind="wrong-shape"
        )
    if not all(math.isfinite(s) and s >= 0 for s in scores) or not sum(scores) > 0:
        raise OpticNerveError(f"{where}: {name} gave no probabilities: {scores}", kind="out-of-range")
    return [s / sum(scores) for s in scores]


def _check_weights(weights: Sequence[float], count: int) -> None:
    if len(weights) != count:
        raise OpticNerveError(f"{len(weights)} weights for {count} predictors", kind="wrong-shape")
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
        raise OpticNerveError(
            f"weights are finite, not negative, and not all zero; got {list(weights)}", kind="out-of-range"
        )


def load_classifier(
    name: str | Path, *, device: str | None = None, trust_remote_code: bool = False
) -> ClassifierPredictor:
    """A classifier from a run's folder, a folder of `save_pretrained`, or a hub name."""
    folder = resolve(str(name))
    family = family_of(folder)
    if family.MODEL is not FusionClassifier:
        raise OpticNerveError(
            f"{name} holds no fusion classifier but a {family.SPEC.KIND} model; {family.USE}", kind="unsupported"
        )
    return ClassifierPredictor(*load_any(folder, device=device, trust_remote_code=trust_remote_code))


@singledispatch
def answers_of(
    model: object, processor: object, asked: Sequence[Conversation], *, max_new_tokens: int, batch_size: int
) -> list[str]:
    """What a model answers to each question: what a language model says, what a classifier chooses."""
    raise OpticNerveError(f"a {type(model).__name__} answers no questions", kind="unsupported")


@answers_of.register
def _(
    model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor, asked: Sequence[Conversation], *,
    max_new_tokens: int, batch_size: int,
) -> list[str]:  # fmt: skip
    return Answerer(model, processor).answer(asked, max_new_tokens=max_new_tokens, batch_size=batch_size)


@answers_of.register
def _(
    model: FusionClassifier,
    processor: FusionClassifierProcessor,
    asked: Sequence[Conversation],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    return ClassifierPredictor(model, processor, batch_size=batch_size).answers(asked)


def _key(conversation: Conversation) -> Any:
    source = conversation.images[0].source
    return source if isinstance(source, str | bytes | Path) else id(source)
