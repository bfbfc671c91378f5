"""The recipe that an experiment varies: what it must have, and the recipes that are made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from opticnerve import recipe as recipes
from opticnerve.data.collators.classification import answer_set
from opticnerve.data.dataset.load import fixed_sample, load_data, load_examples
from opticnerve.evaluation.tasks import score_answers, usual_answers
from opticnerve.plan import data as plan_data
from opticnerve.plan import model as plan_model
from opticnerve.recipe import EvaluateSpec, ModelSpec, Recipe, Stage
from opticnerve.recipe.model import TowerSpec
from opticnerve.starter import minilm
from opticnerve.types import Conversation, OpticNerveError

TASK = "questions"
"""What the test questions are called in every row: their answers stand in answers/questions.jsonl."""
MOST_ANSWERS = 1000

Raw = dict[str, Any]
Budget = dict[str, Any]


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
    name: str = "the recipe"

    def __post_init__(self) -> None:
        model, stages = self.recipe.model, self.recipe.stages
        if not isinstance(model, ModelSpec):
            raise OpticNerveError(
                f"{self.name} describes {model.WHAT}; compare varies the recipe of a docked language model "
                f"(`model: {{language: …, image: …}}`)",
                kind="unsupported",
            )
        if model.image is None or model.audio is not None:
            raise OpticNerveError(
                f"{self.name} has the towers {', '.join(model.towers)}; compare wants one that sees (`model.image`) "
                "and no other",
                kind="unsupported",
            )
        if len(stages) < 2:
            raise OpticNerveError(
                f"{self.name} has {len(stages)} stage(s); compare wants at least two: captions in the first, questions "
                "in the last",
                kind="out-of-range",
            )
        if not any(e.metric == "vqa" for e in self.recipe.evaluate):
            raise OpticNerveError(
                f"{self.name} asks no test questions; add an entry with `metric: vqa` and data under `evaluate:`",
                kind="missing-field",
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
    def image(self) -> TowerSpec:
        assert isinstance(self.recipe.model, ModelSpec)
        assert self.recipe.model.image is not None
        return self.recipe.model.image

    @property
    def can_cache(self) -> bool:
        """Whether a frozen vision encoder sees a picture once and for all: not where pictures are cut into tiles."""
        return self.image.tiling is None

    @cached_property
    def answers(self) -> list[str]:
        """The closed set: every answer in the questions that are trained on; an error where they are none."""
        try:
            return answer_set((c for spec in self.questions.data for c in load_data(spec)), most=MOST_ANSWERS)
        except OpticNerveError as e:
            raise OpticNerveError(
                f"{self.name}, stage {self.questions.name}: {e}. Classifiers choose from a closed set of at most "
                f"{MOST_ANSWERS:,} answers; compare connectors and compare stages need none",
                kind="unsupported",
            ) from e

    # -- the recipes of rows --------------------------------------------------------------------------------------

    def asked(self, questions: int | None) -> Raw:
        """The test questions, the same for every row."""
        return self.tests.model_dump(mode="json") | {"name": TASK, "sample": questions, "image_dependence": 0}

    def docked(
        self, name: str, stages: Sequence[Raw], questions: int | None, *, image: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Raw:  # fmt: skip
        """The base's model, with `image`'s entries in place of its own, trained by these stages."""
        raw = self.recipe.model_dump(mode="json")
        raw["model"]["image"] |= image or {}
        plain = {"name": name, "trackers": [], "forgetting": False, "stages": list(stages)}
        return checked(raw | plain | {"evaluate": [self.asked(questions)]} | more)

    def with_image(self, name: str, budget: Budget, change: Mapping[str, Any], fusion_rate: float) -> Raw:
        """The base with `change` in its vision tower, through captions and questions; a fusion that is changed trains,
        too, and an encoder that is changed does not."""
        stages = []
        for stage, length in ((self.captions, budget["align"]), (self.questions, budget["instruct"])):
            train = {p: rate for p, rate in stage.train.items() if p.removeprefix("image.") != "fusion"}
            train |= {"fusion": fusion_rate} if "fusion" in change else {}
            if "encoder" in change:
                train = {p: r for p, r in train.items() if "encoder" not in p}
            cached = self.can_cache and "encoder" not in change and not any("encoder" in p for p in train)
            stages.append(stage_of(stage, length, train=train, cache_features=cached))
        return self.docked(name, stages, budget["questions"], image={"fusion": {"type": "splice"}, **change})

    def classifier(self, name: str, timing: str, stage: Raw, questions: int | None, **options: Any) -> Raw:
        """A fusion classifier of the base's vision encoder and the text encoder."""
        early = timing == "early"
        model = {
            "timing": timing, "image": None if early else {"encoder": self.image.encoder.model_dump(mode="json")},
            "text": {"encoder": {"type": "hf_text", "name": self.text}}, "options": options,
        }  # fmt: skip
        evaluate = [] if questions is None else [self.asked(questions)]
        return self._two_towers(name, model, stage | {"cache_features": not early}, evaluate)

    def dual(self, name: str, stage: Raw) -> Raw:
        """A dual encoder of the same two, trained on the captions; asked afterwards, as a zero-shot classifier."""
        encoder = self.image.encoder.model_dump(mode="json")
        model = {
            "image": {"encoder": encoder, "pooling": "mean", "projection": True},
            "text": {"encoder": {"type": "hf_text", "name": self.text}, "projection": True},
            "projection_dim": 256, "loss": "clip",
        }  # fmt: skip
        return self._two_towers(name, model, stage, [])

    def _two_towers(self, name: str, model: Raw, stage: Raw, evaluate: list[Raw]) -> Raw:
        return checked({
            "name": name, "seed": self.recipe.seed, "precision": self.recipe.precision, "model": model,
            "stages": [stage], "evaluate": evaluate, "forgetting": False,
        })  # fmt: skip

    def questions_in(self, steps: int, batch_size: int) -> int:
        """About how many questions so many steps of the last stage train on: rows that share a prefix hold several."""
        return round(steps * batch_size * self._questions_a_row)

    @cached_property
    def _questions_a_row(self) -> float:
        examples = load_examples(self.questions.data)
        held = [len(group) if most is None else min(most, len(group)) for group, most in examples]
        return sum(held) / len(held)

    @cached_property
    def tokens(self) -> tuple[int, int]:
        """Mean tokens of a caption's row and of a row of questions, at least 1."""
        processor = plan_model.processor_for(self.recipe)
        captions, questions = (
            max(1, plan_data.inspect_data(stage, processor, seed=self.recipe.seed).length)
            for stage in (self.captions, self.questions)
        )
        return captions, questions

    # -- what the words alone give away ---------------------------------------------------------------------------

    def question_alone(self, questions: int | None) -> list[float]:
        """The scores of a reader who gives each question its most frequent answer in training, and never looks."""
        asked: list[Conversation] = fixed_sample(load_data(self.tests.data), questions)
        return score_answers(asked, usual_answers((c for spec in self.questions.data for c in load_data(spec)), asked))


def stage_of(stage: Stage, length: Budget, **changes: Any) -> Raw:
    """A stage of the base with another length (`steps` of `batch`), and `changes`."""
    sizes = {"steps": length["steps"], "epochs": None, "batch_size": length["batch"], "accumulate": 1}
    return stage.model_dump(mode="json") | sizes | changes


def one_by_one(data: Sequence[Any]) -> list[Raw]:
    """The data with every question as a sample of its own."""
    apart = {"share_prefix": False, "per_image": None, "group_by_image": False}
    return [d.model_dump(mode="json") | apart for d in data]


def checked(raw: Raw) -> Raw:
    """The recipe with its defaults written out; a RecipeError where a row makes no valid one of the base."""
    return recipes.load(raw).model_dump(mode="json")
