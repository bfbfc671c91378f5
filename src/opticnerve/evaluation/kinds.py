"""What differs between the three kinds of model that a recipe may describe: how they are built, named, and asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opticnerve.inference.embeddings import load_dual_encoder
from opticnerve.inference.generate import Answerer
from opticnerve.inference.load import kind_of, load_model, resolve
from opticnerve.inference.predictors import ClassifierPredictor, load_classifier
from opticnerve.models.classifier.build import classifier_recipe
from opticnerve.models.dual_encoder.build import dual_recipe
from opticnerve.models.dual_encoder.modeling import DualEncoder
from opticnerve.models.vlm.build import dock_recipe
from opticnerve.models.vlm.parts import is_docked_model
from opticnerve.recipe import ClassifierSpec, DualSpec, Recipe
from opticnerve.starter import weights
from opticnerve.types import Conversation


def dock_any(recipe: Recipe) -> Any:
    """The `Dock`, `DualDock` or `ClassifierDock` that a recipe describes."""
    if isinstance(recipe.model, DualSpec):
        return dual_recipe(recipe)
    if isinstance(recipe.model, ClassifierSpec):
        return classifier_recipe(recipe)
    return dock_recipe(recipe)


def load_any(name: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """A model of any kind and its processor, in `eval()`."""
    kind = kind_of(resolve(name))
    if kind == "dual":
        return load_dual_encoder(resolve(name), trust_remote_code=trust_remote_code)
    if kind == "classifier":
        found = load_classifier(resolve(name), trust_remote_code=trust_remote_code)
        return found.model, found.processor
    return load_model(name, trust_remote_code=trust_remote_code)


def answers_of(
    model: Any, processor: Any, asked: Sequence[Conversation], *, max_new_tokens: int, batch_size: int
) -> list[str]:
    """What a docked language model says to each question, or a classifier chooses."""
    if is_docked_model(model):
        return Answerer(model, processor).answer(asked, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return ClassifierPredictor(model, processor, batch_size=batch_size).answers(asked)


def describe(dock: Any) -> dict[str, Any]:
    """The parts of a model, for the card and for results.json."""
    if not is_docked_model(dock.model):
        return _describe_two_towers(dock)
    bases, towers = dock.bases, dock.model.towers
    modality, tower = next(iter(towers.items()))
    parts = dock.model.config.towers[modality]
    return {
        "encoder": encoder_name(bases[modality]["name"], parts["encoder"]["type"]),
        "connector": parts["connector"]["type"],
        "fusion": parts["fusion"]["type"],
        "modalities": list(towers),
        "language": bases["language"]["name"],
        "visual_tokens": tower.num_tokens,
        "encoder_width": tower.encoder.hidden_size,
        "encoder_tokens": tower.encoder.num_tokens,
        "image_size": getattr(tower.encoder, "image_size", None),
        "width": tower.connector.out_size,
        # The starter kit's parts are Apache-2.0 all; of other parts we do not know.
        "license": "apache-2.0" if all(weights.is_starter(str(b["name"])) for b in bases.values()) else "other",
    }


def encoder_name(name: Any, kind: str) -> str:
    """How reports call an encoder: by its weights' name, or names, or by its type where it has none."""
    if isinstance(name, dict):
        return " + ".join(encoder_name(n, kind) for n in name.values())
    return str(name) if name is not None else kind


def headline(dock: Any) -> str:
    """One line on what is about to be trained."""
    d = describe(dock)
    if not is_docked_model(dock.model):
        return f"[bold]{d['encoder']}[/bold] with [bold]{d['text']}[/bold]: {d['kind']}"
    return (
        f"[bold]{d['encoder']}[/bold] ({d['encoder_tokens']} × {d['encoder_width']}) → {d['connector']} → "
        f"{d['visual_tokens']} tokens × {d['width']} → [bold]{d['language']}[/bold]"
    )


def _describe_two_towers(dock: Any) -> dict[str, Any]:
    model, bases = dock.model, dock.bases
    names = {
        "kind": f"dual encoder, {model.config.loss} loss" if isinstance(model, DualEncoder)
        else f"fusion classifier, {model.config.timing} fusion",
        "encoder": encoder_name((bases.get("image") or {}).get("name"), "the pixels"),
        "text": str(bases["text"]["name"]),
        "modalities": ["image"],
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    free = all(weights.is_starter(str(b["name"])) for b in bases.values() if b)
    return {**names, "license": "apache-2.0" if free else "other"}
