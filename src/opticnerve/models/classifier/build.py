"""classifier(): a vision encoder and a text encoder make a `FusionClassifier` with its processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import ViTImageProcessor

from opticnerve.data.collators.classification import answer_set
from opticnerve.data.dataset.load import load_data
from opticnerve.models.checkpoint.delta import base_of
from opticnerve.models.classifier.configuration import Timing
from opticnerve.models.classifier.modeling import FusionClassifier
from opticnerve.models.classifier.processing import FusionClassifierProcessor
from opticnerve.models.text_encoder import TwoTowerDock, dtype_of, load_text_encoder
from opticnerve.models.vlm.build import Spec, load_encoder, vision_spec
from opticnerve.recipe import ClassifierSpec, Recipe
from opticnerve.starter import minilm


@dataclass
class ClassifierDock(TwoTowerDock):
    """A `FusionClassifier`, its processor, and the references to the weights it was made of."""

    SPEC: ClassVar = ClassifierSpec
    MODEL: ClassVar = FusionClassifier
    PROCESSOR: ClassVar = FusionClassifierProcessor
    USE: ClassVar[str] = "`eval` takes it"
    BASELINE: ClassVar[bool] = False

    model: FusionClassifier
    processor: FusionClassifierProcessor

    @classmethod
    def build(cls, recipe: Recipe) -> ClassifierDock:
        """The model that a recipe describes, in the recipe's precision."""
        return classifier_recipe(recipe)

    @property
    def what(self) -> str:
        """Family and variant in a few words."""
        return f"fusion classifier, {self.model.config.timing} fusion"


def classifier(
    image: Spec | None,
    text: Spec = minilm.NAME,
    *,
    timing: Timing,
    answers: Sequence[str],
    dtype: torch.dtype = torch.float32,
    seed: int | None = 0,
    **options: Any,
) -> ClassifierDock:
    """Put a vision encoder and a text encoder under a fresh head.

    Args:
        image: as for `dock`'s `vision`; None for early fusion, which reads the pixels. text: as for `dual`.
        timing: "early", "intermediate" or "late". answers: the closed set.
        dtype: of the weights in memory. seed: for the head; None leaves torch's generator alone.
        options: of the head, and late fusion's `combine`; see `opticnerve.models.classifier.heads`.
    """
    vision_name, vision_encoder = (None, None) if image is None else load_encoder("image", vision_spec(image))
    reader_name, reader = load_text_encoder({"name": text} if isinstance(text, str) else text)
    if seed is not None:
        torch.manual_seed(seed)
    model: Any = FusionClassifier.from_parts(vision_encoder, reader, timing=timing, answers=list(answers), **options)
    side = model.classifier.pixels if vision_encoder is None else 0
    half = [0.5] * 3
    prepare = vision_encoder.image_processor() if vision_encoder is not None else ViTImageProcessor(
        size={"height": side, "width": side}, image_mean=half, image_std=half
    )  # fmt: skip
    processor = FusionClassifierProcessor(
        prepare, reader.tokenizer, max_length=reader.max_length, padding=reader.padding, answers=list(answers)
    )
    bases = {"text": base_of(reader_name, reader)}
    if vision_encoder is not None:
        bases["image"] = base_of(vision_name, vision_encoder)
    return ClassifierDock(model.to(dtype), processor, bases)


def classifier_recipe(recipe: Recipe) -> ClassifierDock:
    """The classifier that a recipe describes; its answers are those of the stages' data unless it names them."""
    spec = recipe.model
    assert isinstance(spec, ClassifierSpec)
    answers = spec.answers
    if answers is None:
        answers = answer_set(c for stage in recipe.stages for data in stage.data for c in load_data(data))
    return classifier(
        None if spec.image is None else spec.image.encoder.model_dump(), spec.text.encoder.model_dump(),
        timing=spec.timing, answers=answers, seed=recipe.seed,
        dtype=dtype_of(recipe), **spec.options,
    )  # fmt: skip
