"""The keys of a recipe: types, defaults, and what contradicts what. Validation only: nothing here imports torch."""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from opticnerve.recipe.data import DataSpec
from opticnerve.recipe.model import AnyModelSpec, ModelSpec, Positive, Strict
from opticnerve.recipe.stage import Stage, without_tower
from opticnerve.types import RecipeError


class EvaluateSpec(Strict):
    """Questions with known answers, asked after the last stage (and what is measured along with them)."""

    name: str = "held-out questions"
    metric: Literal[
        "vqa", "yes_no", "ocr", "boxes", "points", "captions", "choice", "multiple_choice", "retrieval", "zero_shot"
    ] = "vqa"
    data: DataSpec
    sample: Positive | None = Field(None, description="a fixed random sample of this many questions")
    image_dependence: Annotated[int, Field(ge=0)] = Field(
        500, description="questions asked again with blank and shuffled pictures"
    )
    max_new_tokens: Positive = 16
    batch_size: Positive = 32
    templates: str | list[str] = Field(
        "photo", description="zero_shot: sentences around a class's name, {} where it stands, or plain, photo, clip"
    )
    classes: list[str] | None = Field(None, description="zero_shot: the closed set; by default all captions that occur")

    @field_validator("data")
    @classmethod
    def _ends(cls, data: DataSpec) -> DataSpec:
        if data.streaming and data.limit is None:
            raise ValueError("a stream is asked its first so many questions; give it a limit")
        if data.weight is not None:
            raise ValueError("weight is for the data of a stage; leave it out")
        return data


# What each kind of model can be asked.
_METRICS = {
    "docked": ("vqa", "yes_no", "ocr", "boxes", "points", "captions", "choice", "multiple_choice"),
    "dual": ("retrieval", "zero_shot"),
    "classifier": ("vqa", "yes_no"),
}


class Recipe(Strict):
    """Everything a run needs. See `docs/recipes.md` for each key."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    model: AnyModelSpec
    # (pydantic copies defaults)
    stages: list[Stage] = []  # noqa: RUF012
    evaluate: list[EvaluateSpec] = []  # noqa: RUF012
    forgetting: bool = True
    forgetting_tokens: Positive | None = Field(
        20_480, description="tokens of the held-out text that perplexity is measured on"
    )
    trackers: list[str] = []  # noqa: RUF012

    @property
    def docked(self) -> ModelSpec:
        """The model, where it is a docked language model.

        Raises:
            RecipeError: it is of another kind.
        """
        if not isinstance(self.model, ModelSpec):
            raise RecipeError(
                f"recipe {self.name} describes {self.model.WHAT}; this works for a docked language model alone "
                f"(`opticnerve train` takes both)"
            )
        return self.model

    def dated(self, day: datetime.date) -> Recipe:
        """The same recipe with a day for the chat templates that write today's date, unless it names one."""
        if not isinstance(self.model, ModelSpec) or self.model.language.date is not None:
            return self
        language = self.model.language.model_copy(update={"date": day})
        return self.model_copy(update={"model": self.model.model_copy(update={"language": language})})

    @model_validator(mode="after")
    def _parts_exist(self) -> Recipe:
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: two stages have the same name; the names are {', '.join(names)}")
        for i, stage in enumerate(self.stages):
            if stage.compile and isinstance(self.model, ModelSpec) and self.model.language.quantize:
                raise ValueError(f"stages.{i}.compile: was not tried over quantised weights; leave one of the two out")
            for part in stage.train:
                try:
                    self.model.check_part(part)
                except ValueError as e:
                    raise ValueError(f"stages.{i}.train.{part}: {e}") from None
        return self

    @model_validator(mode="after")
    def _objectives_and_metrics_fit(self) -> Recipe:
        mine = self.model.KIND
        for i, stage in enumerate(self.stages):
            name = stage.objective.type
            # An objective of a third party may be for any kind of model; it says so itself.
            if any(name in o for o in OBJECTIVES.values()) and name not in OBJECTIVES[mine]:
                raise ValueError(
                    f"stages.{i}.objective: {name} does not train {self.model.WHAT}; write "
                    f"objective: {' or '.join(OBJECTIVES[mine])}"
                )
            asked = [spec.name for spec in self.evaluate]
            if (watched := stage.validate) is not None and watched.metric not in ("loss", *asked):
                raise ValueError(
                    f"stages.{i}.validate.metric: there is no {watched.metric!r}; loss, or the name of an entry of "
                    f"evaluate: {', '.join(asked) or 'there are none'}"
                )
            if stage.pack is not None and name != "next_token":
                raise ValueError(f"stages.{i}.pack: {name} takes samples by themselves; leave it out")
            if stage.cache_features and (reason := self._cannot_cache(stage)):
                raise ValueError(f"stages.{i}.cache_features: {reason}; leave it out")
        for i, spec in enumerate(self.evaluate):
            if spec.metric not in _METRICS[mine]:
                raise ValueError(
                    f"evaluate.{i}.metric: {spec.metric} is not for {self.model.WHAT}; "
                    f"known for it: {', '.join(_METRICS[mine])}"
                )
        return self

    def _cannot_cache(self, stage: Stage) -> str | None:
        """Why this stage's pictures cannot be seen once and for all, if they cannot."""
        vision_encoders = [p for p in stage.train if not p.startswith(("text.", "audio."))]
        if any(without_tower(p)[1].startswith("encoder") for p in vision_encoders):
            return "the stage trains the image encoder, so what it sees changes"
        return self.model.cannot_cache()


OBJECTIVES = {
    "docked": ("next_token", "dpo", "qformer_pretraining", "text_spotting"),
    "dual": ("contrastive",),
    "classifier": ("classification",),
}
