"""A recipe: everything a run needs, in one YAML file, checked before any weight is read.

Here it is read, overridden from the command line, and its errors are put into words; `schema` holds its keys.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from opticnerve.recipe.data import DataSpec, FrameSpec
from opticnerve.recipe.model import FROM, ClassifierSpec, ContinuedSpec, DualSpec, ModelSpec
from opticnerve.recipe.schema import Recipe
from opticnerve.recipe.stage import CacheSpec, PackSpec
from opticnerve.recipe.yaml import MAX_CHARACTERS, brief, parse
from opticnerve.registry import hint_at
from opticnerve.types import RecipeError

T = TypeVar("T", bound=BaseModel)
_SHOWN = 20  # findings in one message


def load(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, without_data: bool = False
) -> Recipe:
    """Read a recipe from a YAML file (or a mapping), apply `key.path=value` overrides, and validate.

    Args:
        without_data: the environment variables in paths of data need not be set, for nothing has to be there.

    Raises:
        RecipeError: names the key, what is wrong with it, and the nearest valid key.
    """
    if isinstance(source, Mapping):
        raw, origin = copy.deepcopy(dict(source)), "recipe"
    else:
        path = Path(source)
        origin = str(path)
        try:
            with path.open(encoding="utf-8") as file:  # one that has no end, such as /dev/zero, is not read to its end
                raw = parse(file.read(MAX_CHARACTERS + 1))
        except FileNotFoundError:
            raise RecipeError(f"there is no recipe {origin}") from None
        except (OSError, UnicodeDecodeError) as e:
            raise RecipeError(f"{origin} is not readable YAML: {e}") from e
        except RecipeError as e:
            raise RecipeError(f"{origin}: {e}") from e
        if not isinstance(raw, dict):
            raise RecipeError(f"{origin} holds no mapping; a recipe starts with `model:` and `stages:`")
    return _validated(Recipe, raw, overrides, origin, without_data=without_data)


def data_entry(raw: dict[str, Any], overrides: Sequence[str] = ()) -> DataSpec:
    """One data entry by itself, with `key=value` overrides.

    Raises:
        RecipeError: as `load`.
    """
    return _validated(DataSpec, raw, overrides, "data")


def _validated(kind: type[T], raw: dict[str, Any], overrides: Sequence[str], origin: str, **context: Any) -> T:
    for override in overrides:
        _override(raw, override)
    try:
        return kind.model_validate(raw, context=context)
    except UnicodeEncodeError as e:
        raise RecipeError(f"{origin}: a text holds half a surrogate pair, which is no character: {e}") from e
    except ValidationError as e:
        lines = [f"{origin}: {brief(line, 500)}" for line in _explain(e, kind)]
        more = [f"{origin}: and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise RecipeError("\n".join(lines[:_SHOWN] + more)) from None


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, defaults written out: what a run folder keeps."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# Two ways to say how long a stage is: an override of one takes the place of the other.
_INSTEAD = {"steps": "epochs", "epochs": "steps"}


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {brief(override)!r} is not key=value, such as stages.0.steps=50")
    try:
        _set(raw, key, text)
    except RecipeError as e:
        raise RecipeError(f"override {brief(key)}: {e}") from e


def _parsed(key: str, text: str) -> Any:
    """A template of a column map begins as a YAML mapping does, and is none."""
    under_columns = re.search(r"(^|\.)columns\.[^=]+$", key) is not None
    return text if under_columns and text[:1] not in ("'", '"', "[") else parse(text)


def _set(raw: dict[str, Any], key: str, text: str) -> None:
    # YAML 1.1 reads 1e-3 as a string; people mean a number.
    value = float(text) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) else _parsed(key, text)
    steps = re.findall(r"[^.()]+(?:\.last\(\d+\))?", key) if ".last(" in key else key.split(".")
    here: Any = raw
    for i, step in enumerate(steps):
        index: Any = step
        if i and steps[i - 1] == "columns" and isinstance(here, dict):  # messages.role is one name
            here[".".join(steps[i:])] = value
            return
        if isinstance(here, list):
            if not step.isdecimal() or int(step) >= len(here):
                where = brief(".".join(steps[: i + 1]))
                raise RecipeError(f"{where} is a list of {len(here)}; use a number from 0 to {len(here) - 1}")
            index = int(step)
        elif isinstance(here, dict):
            # `stages.0.train.language.lora`: a part's name holds a dot itself.
            rest = ".".join(steps[i:])
            if rest in here or (i and steps[i - 1] == "train"):
                here[rest] = value
                return
        else:
            raise RecipeError(f"{brief('.'.join(steps[:i]))} holds a single value")
        if i < len(steps) - 1:
            if isinstance(here, dict) and not isinstance(here.get(index), dict | list):
                here[index] = {}
            here = here[index]
    here[index] = value
    if isinstance(here, dict) and index in _INSTEAD and value is not None:
        here.pop(_INSTEAD[index], None)


# pydantic names the kind of model that it took `model:` for; of keys that take a word or a mapping it tries both, and
# reports on both, under names of its own.
_KINDS: dict[Any, type[BaseModel]] = {c.KIND: c for c in (ModelSpec, DualSpec, ClassifierSpec)} | {FROM: ContinuedSpec}
_MAPPINGS: dict[Any, type[BaseModel]] = {c.__name__: c for c in (PackSpec, CacheSpec, FrameSpec)}
_SCALARS = ("constrained-int", "bool")


def _explain(error: ValidationError, root: type[BaseModel]) -> Iterator[str]:
    """pydantic's findings as sentences with the key and the remedy."""
    for found in error.errors():
        place = [p for i, p in enumerate(found["loc"]) if not (i == 1 and p in _KINDS)]
        if place and place[-1] in (*_MAPPINGS, *_SCALARS):
            if isinstance(found["input"], Mapping) == (place[-1] in _SCALARS):
                continue  # what was given is of the other form
            place.pop()
        key = ".".join(str(p) for p in place if p not in _MAPPINGS) or "recipe"
        if found["type"] == "extra_forbidden":
            known = _keys_at(root, found["loc"][:-1])
            hint = hint_at(str(found["loc"][-1]), known).lstrip("; ") or f"known here: {', '.join(known)}"
            yield f"{key}: unknown key; {hint}"
        elif found["type"] == "missing":
            yield f"{key}: is missing"
        else:
            message = found["msg"].removeprefix("Value error, ")
            given = f", not {found['input']!r}" if isinstance(found.get("input"), str | int | float | bool) else ""
            yield f"{key}: {message}{given if given not in message else ''}"


def _keys_at(root: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Valid keys of the mapping at a location, by walking the models."""
    here: Any = root
    for place, step in enumerate(location):
        if isinstance(step, int):
            continue
        if (named := (_KINDS if place == 1 else _MAPPINGS).get(step)) is not None:
            here = named
            continue
        field = getattr(here, "model_fields", {}).get(step)
        inside = _arguments(field.annotation) if field is not None else ()
        here = next((a for a in inside if isinstance(a, type) and issubclass(a, BaseModel)), None)
    return [field.alias or name for name, field in getattr(here, "model_fields", {}).items()]


def _arguments(annotation: object) -> Iterator[Any]:
    yield annotation
    for argument in get_args(annotation):
        yield from _arguments(argument)
