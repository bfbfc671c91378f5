"""A recipe: everything a run needs, in one YAML file, checked before any weight is read. Nothing here imports torch."""

from opticnerve.recipe.data import DataSpec
from opticnerve.recipe.loading import dump, load
from opticnerve.recipe.model import (
    FROM,
    MODALITIES,
    PARTS,
    ClassifierSpec,
    ContinuedSpec,
    DualSpec,
    EncoderSpec,
    LanguageSpec,
    ModelSpec,
    PartSpec,
    Quantize,
    ReaderSpec,
    TextSpec,
    TilingSpec,
    TowerSpec,
    TwoTowerSpec,
    VisionSpec,
    split_part,
)
from opticnerve.recipe.schema import EvaluateSpec, Recipe
from opticnerve.recipe.stage import CacheSpec, LoraSpec, PackSpec, Stage, ValidateSpec

__all__ = [
    "CacheSpec", "ClassifierSpec", "ContinuedSpec", "DataSpec", "DualSpec", "EncoderSpec", "EvaluateSpec", "FROM",
    "VisionSpec", "LanguageSpec", "LoraSpec",
    "MODALITIES", "ModelSpec", "PARTS", "PackSpec", "PartSpec", "Quantize", "ReaderSpec", "Recipe", "Stage", "TextSpec",
    "TilingSpec", "TowerSpec", "TwoTowerSpec", "ValidateSpec", "dump", "load", "split_part",
]  # fmt: skip
