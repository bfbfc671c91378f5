"""dual(): a vision encoder and a text encoder make a `DualEncoder` with its processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from opticnerve.encoders.pooling import VisionPooling
from opticnerve.models.dual_encoder.modeling import DualEncoder
from opticnerve.models.dual_encoder.processing import DualEncoderProcessor
from opticnerve.models.two_towers import TwoTowerDock, TwoTowerModel, load_encoders, quantize_encoders
from opticnerve.models.vlm.build import Spec, dtype_of
from opticnerve.recipe import DualSpec, Recipe
from opticnerve.starter import minilm


@dataclass
class DualDock(TwoTowerDock):
    """A `DualEncoder`, its processor, and the references to the weights it was made of."""

    SPEC: ClassVar = DualSpec
    MODEL: ClassVar = DualEncoder
    PROCESSOR: ClassVar = DualEncoderProcessor
    USE: ClassVar[str] = "`opticnerve classify`, `embed` and `eval` take it"
    BASELINE: ClassVar[bool] = True  # what the encoders give through projections that have learned nothing

    model: DualEncoder
    processor: DualEncoderProcessor

    @classmethod
    def build(cls, recipe: Recipe) -> DualDock:
        """The model that a recipe describes, in the recipe's precision."""
        encoders, options = cls.described(recipe)
        return dual(*encoders, seed=recipe.seed, dtype=dtype_of(recipe), **options)

    @classmethod
    def described(cls, recipe: Recipe) -> tuple[tuple[Spec, Spec], dict[str, Any]]:
        spec = recipe.model
        assert isinstance(spec, DualSpec)
        return (spec.image.encoder.model_dump(), spec.text.encoder.model_dump()), {
            "pooling": spec.image.pooling, "projection_dim": spec.projection_dim,
            "image_projection": spec.image.projection, "text_projection": spec.text.projection, "loss": spec.loss,
        }  # fmt: skip

    @classmethod
    def processor_of(cls, model: TwoTowerModel) -> DualEncoderProcessor:
        made: DualEncoderProcessor = cls.PROCESSOR.of(model.image.encoder.image_processor(), model.text.encoder)
        return made

    @property
    def what(self) -> str:
        return f"dual encoder, {self.model.config.loss} loss"


def dual(
    image: Spec,
    text: Spec = minilm.NAME,
    *,
    pooling: VisionPooling = "mean",
    projection_dim: int | None = 512,
    image_projection: dict[str, Any] | bool = True,
    text_projection: dict[str, Any] | bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int | None = 0,
    **options: Any,
) -> DualDock:
    """Put a vision encoder and a text encoder into one space, with fresh projections.

    Args:
        image, text: see `load_encoders`.
        pooling, projection_dim, image_projection, text_projection, options: see `DualEncoder.from_parts`.
        dtype: of the weights in memory. seed: for the projections; None leaves torch's generator alone.
    """
    vision_encoder, text_encoder, bases = load_encoders(image, text, seed)
    model: Any = DualEncoder.from_parts(
        vision_encoder, text_encoder, pooling=pooling, projection_dim=projection_dim,
        image_projection=image_projection, text_projection=text_projection, **options,
    )  # fmt: skip
    made = DualDock(model.to(dtype), DualDock.processor_of(model), bases)
    quantize_encoders(made)
    return made
