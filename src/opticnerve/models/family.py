"""The families of models, and what the rest of the house asks of each of them: by these methods, never by its kind.

A family is a folder (`vlm`, `dual_encoder`, `classifier`) whose `build.py` holds a class that is a `Family`: a model
with its processor, made by a recipe, saved after a stage and described in a report. How its answers are had stands
above, in `inference.predictors`; which collator feeds it, its objective says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from transformers import PreTrainedConfig

from opticnerve.models.checkpoint.strict import wrap_errors
from opticnerve.models.classifier.build import ClassifierDock
from opticnerve.models.dual_encoder.build import DualDock
from opticnerve.models.vlm.build import Dock
from opticnerve.models.vlm.tower import Tower
from opticnerve.recipe import Recipe
from opticnerve.types import OpticNerveError


class FamilyModel(Protocol):
    """A model of any family: a `PreTrainedModel` that knows its parts.

    `language_model` is None, and `towers` (by modality) empty, where there is no language model to dock onto.
    """

    @property
    def language_model(self) -> Any: ...
    @property
    def towers(self) -> Mapping[str, Tower]: ...
    @property
    def image(self) -> Any: ...
    @property
    def adapters(self) -> Mapping[str, dict[str, Any]]: ...
    def give_lora(self, options: dict[str, Any], part: str = "language", *, fresh: bool = True) -> None: ...

    def part_parameters(self, part: str) -> dict[str, nn.Parameter]:
        """Full name → parameter of a part, by the word a stage uses for it; an OpticNerveError where there is none."""
        ...

    def full_name(self, part: str) -> str:
        """The word for a part that is clear without its recipe."""
        ...

    def whole_parts(self) -> list[tuple[str, tuple[str, ...]]]:
        """What the freeze table sums up: each label, and the beginnings of the names under it."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def eval(self) -> Any: ...
    @property
    def to(self) -> Callable[..., Any]: ...


class Family(Protocol):
    """A model of one family with its processor, and the references to the weights that it was made of (`bases`).

    `SPEC`: what a recipe says under `model`. `MODEL`, `PROCESSOR`: their classes; the configuration's `model_type`
    names the family in a folder. `USE`: what on the command line takes a model of it. `BASELINE`: whether it is
    measured before it is trained, too, so that the gain is over that.
    """

    SPEC: ClassVar[Any]
    MODEL: ClassVar[Any]
    PROCESSOR: ClassVar[Any]
    USE: ClassVar[str]
    BASELINE: ClassVar[bool]

    lora: dict[str, Any] | None

    @property
    def model(self) -> Any: ...  # a `FamilyModel`, and a `PreTrainedModel`
    @property
    def processor(self) -> Any: ...
    @property
    def bases(self) -> dict[str, Any]: ...

    @classmethod
    def build(cls, recipe: Recipe) -> Family:
        """The model that a recipe describes, in the recipe's precision."""
        ...

    def save(self, folder: Path, trained: Iterable[str]) -> None:
        """A stage's folder. `trained`: names of all parameters that any stage so far has trained."""
        ...

    def load_stage(self, folder: Path) -> set[str]:
        """Bring the model to where a finished stage left it; returns the names of all parameters trained so far."""
        ...

    def describe(self) -> dict[str, Any]:
        """The model's parts, for the card and for results.json."""
        ...

    def headline(self) -> str:
        """One line on what is about to be trained, in rich's markup."""
        ...


FAMILIES: tuple[type[Family], ...] = (Dock, DualDock, ClassifierDock)


def build(recipe: Recipe) -> Family:
    """The model that a recipe describes, with its processor."""
    return family_for(recipe).build(recipe)


def family_for(recipe: Recipe) -> type[Family]:
    """The family of the model that a recipe describes."""
    return next(f for f in FAMILIES if recipe.model.KIND == f.SPEC.KIND)


def family_of(folder: str) -> type[Family]:
    """The family of the model in a folder, by its config.json.

    Raises:
        OpticNerveError: it is damaged, or another library's model.
    """
    with wrap_errors("config.json", folder):
        config, _ = PreTrainedConfig.get_config_dict(folder)
    found = str(config.get("model_type"))
    for family in FAMILIES:
        if family.MODEL.config_class.model_type == found:
            return family
    raise OpticNerveError(
        f"{folder} holds a {found[:80]}, which is no model of opticnerve; `opticnerve import` takes LLaVA's and "
        "BLIP-2's kinds over, and a recipe docks encoders onto language models",
        kind="unsupported",
    )
