"""classifier(): a vision encoder and a text encoder make a `FusionClassifier` with its processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import ViTImageProcessor

from opticnerve.data.collators.classification import answer_set
from opticnerve.data.dataset.load import load_data
from opticnerve.models.classifier.configuration import Timing
from opticnerve.models.classifier.modeling import FusionClassifier
from opticnerve.models.classifier.processing import FusionClassifierProcessor
from opticnerve.models.two_towers import TwoTowerDock, TwoTowerModel, load_encoders, quantize_encoders
from opticnerve.models.vlm.build import Spec, dtype_of
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
        """The classifier that a recipe describes; its answers are those of the stages' data unless it names them."""
        encoders, options = cls.described(recipe)
        return classifier(*encoders, seed=recipe.seed, dtype=dtype_of(recipe), **options)

    @classmethod
    def described(cls, recipe: Recipe) -> tuple[tuple[Spec | None, Spec], dict[str, Any]]:
        spec = recipe.model
        assert isinstance(spec, ClassifierSpec)
        answers = spec.answers
        if answers is None:
            answers = answer_set(c for stage in recipe.stages for data in stage.data for c in load_data(data))
        image = None if spec.image is None else spec.image.encoder.model_dump()
        return (image, spec.text.encoder.model_dump()), {"timing": spec.timing, "answers": answers, **spec.options}

    @classmethod
    def processor_of(cls, model: TwoTowerModel) -> FusionClassifierProcessor:
        if model.image is None:
            head: Any = model.classifier
            side, half = head.pixels, [0.5] * 3
            prepare: Any = ViTImageProcessor(size={"height": side, "width": side}, image_mean=half, image_std=half)
        else:
            prepare = model.image.encoder.image_processor()
        config: Any = model.config
        made: FusionClassifierProcessor = cls.PROCESSOR.of(prepare, model.text.encoder, answers=list(config.answers))
        return made

    @property
    def what(self) -> str:
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
        image, text: see `load_encoders`; no image encoder for early fusion, which reads the pixels.
        timing: "early", "intermediate" or "late". answers: the closed set.
        dtype: of the weights in memory. seed: for the head; None leaves torch's generator alone.
        options: of the head, and late fusion's `combine`; see `opticnerve.models.classifier.parts`.
    """
    vision_encoder, text_encoder, bases = load_encoders(image, text, seed)
    model: Any = FusionClassifier.from_parts(
        vision_encoder, text_encoder, timing=timing, answers=list(answers), **options
    )
    made = ClassifierDock(model.to(dtype), ClassifierDock.processor_of(model), bases)
    quantize_encoders(made)
    return made
