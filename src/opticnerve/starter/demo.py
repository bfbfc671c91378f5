"""The recipes and the model that ship with the package."""

from __future__ import annotations

from pathlib import Path

from opticnerve.types import OpticNerveError

_HERE = Path(__file__).parent
# A wheel carries the recipes beside this file; a checkout keeps them at its top.
_RECIPES = next((p for p in (_HERE / "recipes", _HERE.parents[2] / "recipes") if p.is_dir()), _HERE / "recipes")


def recipe_path(name: str = "starter") -> Path:
    """A packaged recipe by name: `starter` (ten minutes on two cores), `starter-full`, `photos`."""
    path = _RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in _RECIPES.glob("*.yaml")))
        raise OpticNerveError(f"there is no packaged recipe {name!r}; known: {known}")
    return path


def shipped_model() -> Path:
    """The connector and adapter that `starter-full` trained."""
    folder = _HERE / "model"
    if not (folder / "dock.json").is_file():
        raise OpticNerveError("this installation carries no starter model; train one with `opticnerve demo`")
    return folder
