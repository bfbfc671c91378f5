"""The recipe that an experiment varies: what it must have, and the recipes that are made of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from opticnerve import recipe as recipes
from opticnerve.data.collators.classification import answer_set
from opticnerve.data.dataset.load import fixed_sample, load_data, load_examples
from opticnerve.evaluation.tasks import score_answers, usual_answers
from opticnerve.recipe import EvaluateSpec, ModelSpec, Recipe, Stage
from opticnerve.starter import minilm
from opticnerve.types import Conversation, OpticNerveError

TASK = "questions"
"""What the test questions are called in every row: their answers stand in answers/questions.jsonl."""
MOST_ANSWERS = 1000

Raw = dict[str, Any]


@dataclass(frozen=True)
class Base:
    """A docked model with a stage of captions (its first) and one of questions (its last), and test questions.

    Args:
        recipe: of a docked language model; stages between the first and the last are left out of the experiments.
        text: the text encoder of those rows that have one.

    Raises:
        OpticNerveError: the recipe lacks something; the message says what.
    """

    recipe: Recipe
    text: str = minilm.NAME
    name: str = field(default="the recipe")

    def __post_init__(self) -> None:
        recipe, where = self.recipe, self.name
        if not isinstance(recipe.model, ModelSpec):
            raise OpticNerveError(
                f"{where} describes {recipe.model.WHAT}; compare varies the recipe of a docked language model "
                f"(`model: {{language: …, image: …}}`)"
            )
        if recipe.model.image is None or recipe.model.audio is not None:
            have = ", ".join(recipe.model.towers)
            raise OpticNerveError(
                f"{where} has the towers {have}; compare wants one that sees (`model.image`) and no other"
            )
        if len(recipe.stages) < 2:
            raise OpticNerveError(
                f"{where} has {len(recipe.stages)} stage(s); compare wants at least two: captions in the first, "
                f"questions in the last"
            )
        if not any(e.metric == "vqa" for e in recipe.evaluate):
            raise OpticNerveError(
                f"{where} asks no test questions; add an entry with `metric: vqa` and data under `evaluate:`"
            )

    @property
    def captions(self) -> Stage:
        return self.recipe.stages[0]

    @property
    def questions(self) -> Stage:
        return self.recipe.stages[-1]

    @property
    def tests(self) -> EvaluateSpec:
        return next(e for e in self.recipe.evaluate if e.metric == "vqa")

    @property
    def encoder(self) -> Raw:
        """The vision encoder, as under `model.image.encoder`."""
        assert isinstance(self.recipe.model, ModelSpec)
        assert self.recipe.model.image is not None
        return self.recipe.model.image.encoder.model_dump(mode="json")

    @property
    def can_cache(self) -> bool:
        """Whether a frozen vision encoder sees a picture once and for all: not where pictures are cut into tiles."""
        assert isinstance(self.recipe.model, ModelSpec)
        assert self.recipe.model.image is not None
        return self.recipe.model.image.tiling is None

    @cached_property
    def answers(self) -> list[str]:
        """The closed set: every answer in the questions that are trained on.

        Raises:
            OpticNerveError: they are no closed set.
        """
        try:
            return answer_set((c for spec in self.questions.data for c in load_data(spec)), most=MOST_ANSWERS)
        except OpticNerveError as e:
            raise OpticNerveError(
                f"{self.name}, stage {self.questions.name}: {e}. Classifiers choose from a closed set of at most "
                f"{MOST_ANSWERS:,} answers; compare connectors and compare stages need none"
            ) from e

    # -- the recipes of rows --------------------------------------------------------------------------------------

    def asked(self, questions: int | None) -> Raw:
        """The test questions, the same for every row."""
        told = self.tests.model_dump(mode="json")
        return told | {"name": TASK, "sample": questions, "image_dependence": 0}

    def docked(
        self, name: str, stages: Sequence[Raw], questions: int | None, *, image: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Raw:  # fmt: skip
        """The base's model, with `image`'s entries in place of its own, trained by these stages."""
        raw = self.recipe.model_dump(mode="json")
        raw["model"]["image"] |= copy.deepcopy(dict(image or {}))
        plain = {"name": name, "trackers": [], "forgetting": False, "stages": list(stages)}
        return checked(raw | plain | {"evaluate": [self.asked(questions)]} | more)

    def classifier(self, name: str, timing: str, stage: Raw, questions: int | None, **options: Any) -> Raw:
        """A fusion classifier of the base's vision encoder and the text encoder."""
        vision_encoder = None if timing == "early" else {"encoder": self.encoder}
        model = {"timing": timing, "image": vision_encoder, "text": {"encoder": {"type": "hf_text", "name": self.text}}}
        stage = stage | {"cache_features": timing != "early"}
        evaluate = [] if questions is None else [self.asked(questions)]
        return self._two_towers(name, model | {"options": options}, stage, evaluate)

    def dual(self, name: str, stage: Raw, dim: int = 256) -> Raw:
        """A dual encoder of the same two, trained on the captions; asked afterwards, as a zero-shot classifier."""
        model = {
            "image": {"encoder": self.encoder, "pooling": "mean", "projection": True},
            "text": {"encoder": {"type": "hf_text", "name": self.text}, "projection": True},
            "projection_dim": dim, "loss": "clip",
        }  # fmt: skip
        return self._two_towers(name, model, stage, [])

    def _two_towers(self, name: str, model: Raw, stage: Raw, evaluate: list[Raw]) -> Raw:
        base = self.recipe
        return checked({
            "name": name, "seed": base.seed, "precision": base.precision, "model": model, "stages": [stage],
            "evaluate": evaluate, "forgetting": False,
        })  # fmt: skip

    def questions_in(self, steps: int, batch_size: int) -> int:
        """About how many questions so many steps of the last stage train on: rows that share a prefix hold several."""
        examples = load_examples(self.questions.data)
        held = [len(group) if most is None else min(most, len(group)) for group, most in examples]
        return round(steps * batch_size * sum(held) / len(held))

    # -- what the words alone give away ---------------------------------------------------------------------------

    def test_questions(self, questions: int | None) -> list[Conversation]:
        return fixed_sample(load_data(self.tests.data), questions)

    def question_alone(self, questions: int | None) -> list[float]:
        """The scores of a reader who gives each question its most frequent answer in training, and never looks."""
        asked = self.test_questions(questions)
        return score_answers(asked, usual_answers((c for spec in self.questions.data for c in load_data(spec)), asked))


def stage_of(stage: Stage, *, steps: int, batch_size: int, **changes: Any) -> Raw:
    """A stage of the base with another length, and `changes`."""
    raw = stage.model_dump(mode="json")
    return raw | {"steps": steps, "epochs": None, "batch_size": batch_size, "accumulate": 1} | changes


def one_by_one(data: Sequence[Any]) -> list[Raw]:
    """The data with every question as a sample of its own."""
    return [
        d.model_dump(mode="json") | {"share_prefix": False, "per_image": None, "group_by_image": False} for d in data
    ]


def scaled(steps: int, scale: float) -> int:
    return max(1, round(steps * scale))


def checked(raw: Raw) -> Raw:
    """The recipe with its defaults written out.

    Raises:
        RecipeError: what a row makes of the base is no valid recipe.
    """
    return recipes.load(raw).model_dump(mode="json")


def steps_for(questions: int, batch_size: int) -> int:
    return max(1, math.ceil(questions / batch_size))
