"""The recipes and the model that ship with the package."""

from __future__ import annotations

import difflib
from pathlib import Path

from opticnerve.types import OpticNerveError, RecipeError

_HERE = Path(__file__).parent
# A wheel carries the recipes beside this file; a checkout keeps them at its top.
_RECIPES = next((p for p in (_HERE / "recipes", _HERE.parents[2] / "recipes") if p.is_dir()), _HERE / "recipes")

SHIPPED = {"starter": "model", "starter-receipts": "receipts/model"}
"""The models that ship with the package: the demo's, by `starter-full`, and the reader of receipts."""


def packaged() -> list[str]:
    """The names of the packaged recipes; they may hold dots (`llava-1.5-7b`)."""
    return sorted(p.stem for p in _RECIPES.glob("*.yaml"))


def recipe_path(name: str = "starter") -> Path:
    """The file of a packaged recipe (`starter`, `llava-1.5-7b`, …), or else of the recipe at the path `name`.

    A packaged name comes first, whatever is called so here; `./NAME` is the file or folder.

    Raises:
        RecipeError: there is neither; the message lists the packaged ones.
    """
    known = packaged()
    if name in known:
        return _RECIPES / f"{name}.yaml"
    path = Path(name)
    if path.is_dir():
        raise RecipeError(f"{name} is a folder; name the recipe's file in it, or a packaged recipe: {', '.join(known)}")
    if path.exists():
        return path
    plain = {k.casefold(): k for k in known}
    typed = path.name.removesuffix(".yml").removesuffix(".yaml").casefold()
    near = [plain[n] for n in difflib.get_close_matches(typed, plain, n=1, cutoff=0.75)]
    hint = f"; did you mean the packaged {near[0]!r}?" if near else ""
    raise RecipeError(f"there is no recipe {name!r}, no file and no packaged one{hint} (packaged: {', '.join(known)})")


def shipped_model(name: str = "starter") -> Path:
    """The folder of a shipped model (`SHIPPED`): its connector, its adapter, and what else of it was trained."""
    folder = _HERE / SHIPPED[name]
    if not (folder / "dock.json").is_file():
        raise OpticNerveError(
            f"this installation carries no model {name!r}; train one with `opticnerve demo`, or its recipe",
            kind="not-installed",
        )
    return folder
