"""What a name on the command line stands for: a model's folder, a processor."""

from __future__ import annotations

from typing import Any


def model_folder(name: str) -> str:
    """The folder (or hub name) that holds a model: a run's last finished stage, the shipped starter, …"""
    from opticnerve.inference.load import resolve

    return resolve(name)


def processor_of(name: str, overrides: list[str] | None = None) -> Any:
    """The processor of a model or of a recipe's model; no weight is read."""
    from opticnerve.cli.output import is_recipe, read_recipe

    if is_recipe(name):
        from opticnerve.plan import processor_for

        return processor_for(read_recipe(name, overrides))
    from opticnerve.models import OpticNerveProcessor

    return OpticNerveProcessor.from_pretrained(model_folder(name))
