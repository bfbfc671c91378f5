"""What a name on the command line stands for: a processor."""

from __future__ import annotations

from typing import Any


def processor_of(name: str, overrides: list[str] | None = None) -> Any:
    """The processor of a model or of a recipe's model; no weight is read."""
    from opticnerve.cli.output import is_recipe, read_recipe

    if is_recipe(name):
        from opticnerve.plan.plan import processor_for

        return processor_for(read_recipe(name, overrides))
    from opticnerve.inference.load import load_processor, resolve

    return load_processor(resolve(name, weights=False))
