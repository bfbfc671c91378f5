"""What commands share: where things are printed, JSON alone on stdout, models and recipes by their names."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any


def examples(*commands: str, note: str = "") -> str:
    """An epilog with commands to paste. Blank lines keep typer from joining them into one paragraph."""
    lines = ["[bold]Examples[/]", *(f"[green]{c.replace('[', chr(92) + '[')}[/]" for c in commands)]
    return "\n\n".join([*lines, *([note] if note else [])])


def console_for(as_json: bool) -> Any:
    """A console for what people read: stderr when stdout belongs to a script."""
    from rich.console import Console

    return Console(stderr=as_json)


def table_of(title: str, *columns: str, **more: Any) -> Any:
    """A rich table; columns whose names begin with `>` stand on the right."""
    from rich.table import Table

    heading = {"title": title, "title_justify": "left", "title_style": "bold"} if title else {}
    table = Table(**{**heading, **more})
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def print_json(value: object) -> None:
    """Strict JSON on stdout: infinities and NaN, for which JSON has no word, become null."""
    sys.stdout.write(json.dumps(_plain(value), indent=1, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _plain(value: object) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    return str(value)


def quiet_libraries() -> None:
    """No bars while weights are read from disk; downloads keep theirs, for they take long."""
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    # It tells of kernels that it would fetch from the hub.
    logging.get_logger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.disable_progress_bar()  # those of huggingface_hub go with it
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:  # where the environment says it, it is not ours to say
        enable_progress_bars()


def load_answerer(model: str, trust_remote_code: bool = False) -> Any:
    """The `Answerer` of a model by any of the names that `MODEL_HELP` lists."""
    from opticnerve.inference.generate import Answerer
    from opticnerve.inference.load import load_model

    quiet_libraries()
    return Answerer(*load_model(model, trust_remote_code=trust_remote_code))


def is_recipe(name: str) -> bool:
    """Whether an argument that may be data, a model or a recipe is a recipe: a packaged one's name, or a YAML file."""
    from opticnerve.starter.demo import packaged

    return name in packaged() or Path(name).suffix.lower() in (".yaml", ".yml")


def read_recipe(name: str, overrides: list[str] | None = None, *, without_data: bool = False) -> Any:
    """The packaged recipe of that name, or the one in a file; `without_data` as for `recipe.load`."""
    from opticnerve import recipe
    from opticnerve.cli.guard import emit
    from opticnerve.starter.demo import packaged, recipe_path

    if name in packaged() and Path(name).exists():
        emit(f"{name} is the packaged recipe here; what is called so in this folder is ./{name}", style="dim")
    return recipe.load(recipe_path(name), overrides or [], without_data=without_data)
