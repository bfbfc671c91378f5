"""dual(): a vision encoder and a text encoder make a `DualEncoder` with its processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from opticnerve.encoders.pooling import VisionPooling
from opticnerve.models.checkpoint.delta import base_of
from opticnerve.models.dual_encoder.modeling import DualEncoder
from opticnerve.models.dual_encoder.processing import DualEncoderProcessor
from opticnerve.models.text_encoder import TwoTowerDock, dtype_of, load_text_encoder
from opticnerve.models.vlm.build import Spec, load_encoder, vision_spec
from opticnerve.recipe import DualSpec, Recipe
from opticnerve.starter import minilm


@dataclass
class DualDock(TwoTowerDock):
    """A `DualEncoder`, its processor, and the references to the weights it was made of."""

    SPEC: ClassVar = DualSpec
    MODEL: ClassVar = DualEncoder
    PROCESSOR: ClassVar = DualEncoderProcessor
    USE: ClassVar[str] = "`opticnerve classify`, `embed` and `eval` take it"
    BASELINE: ClassVar[bool] = True

    model: DualEncoder
    processor: DualEncoderProcessor

    @classmethod
    def build(cls, recipe: Recipe) -> DualDock:
        """The model that a recipe describes, in the recipe's precision."""
        return dual_recipe(recipe)

    @property
    def what(self) -> str:
        """Family and variant in a few words."""
        return f"dual encoder, {self.model.config.loss} loss"


def dual_recipe(recipe: Recipe) -> DualDock:
    """The dual encoder that a recipe describes, in the recipe's precision."""
    spec = recipe.model
    assert isinstance(spec, DualSpec)
    return dual(
        spec.image.encoder.model_dump(), spec.text.encoder.model_dump(), pooling=spec.image.pooling,
        projection_dim=spec.projection_dim, image_projection=spec.image.projection,
        text_projection=spec.text.projection, loss=spec.loss, seed=recipe.seed,
        dtype=dtype_of(recipe),
    )  # fmt: skip


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
        image: as for `dock`'s `vision`. text: a hub name, local folder or starter name of a BERT, of CLIP's or SigLIP's
            text model, or of a causal language model (GGUF files, too); or a mapping such as
            `{"name": …, "pooling": "mean", "max_length": 32}`.
        pooling, projection_dim, image_projection, text_projection, options: see `DualEncoder.from_parts`.
        dtype: of the weights in memory. seed: for the projections; None leaves torch's generator alone.
    """
    vision_name, vision_encoder = load_encoder("image", vision_spec(image))
    reader_name, reader = load_text_encoder({"name": text} if isinstance(text, str) else text)
    if seed is not None:
        torch.manual_seed(seed)
    model = DualEncoder.from_parts(
        vision_encoder, reader, pooling=pooling, projection_dim=projection_dim, image_projection=image_projection,
        text_projection=text_projection, **options,
    )  # fmt: skip
    processor = DualEncoderProcessor(
        vision_encoder.image_processor(), reader.tokenizer, max_length=reader.max_length, padding=reader.padding
    )
    bases = {"image": base_of(vision_name, vision_encoder), "text": base_of(reader_name, reader)}
    return DualDock(model.to(dtype), processor, bases)  # type: ignore[arg-type]
