"""What commands share: the words of their help, where things are printed, and JSON alone on stdout."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, all else on stderr.")]
TrustFlag = Annotated[bool, typer.Option("--trust-remote-code", help="Run parts that the model names by dotted path.")]
RECIPE_HELP = "A recipe (YAML), or the name of a packaged one: starter, starter-contrastive, llava-1.5-7b, …"
OVERRIDES_HELP = "Changes to the recipe, such as [cyan]stages.0.steps=50[/] or [cyan]precision=fp32[/]."


def examples(*commands: str, note: str = "") -> str:
    """An epilog with commands to paste. Blank lines keep typer from joining them into one paragraph."""
    lines = ["[bold]Examples[/]", *(f"[green]{c.replace('[', chr(92) + '[')}[/]" for c in commands)]
    return "\n\n".join([*lines, *([note] if note else [])])


def console_for(as_json: bool) -> Any:
    """A console for what people read: stderr when stdout belongs to a script."""
    from rich.console import Console

    return Console(stderr=as_json)


def print_json(value: Any) -> None:
    """Strict JSON on stdout: infinities and NaN, for which JSON has no word, become null."""
    sys.stdout.write(json.dumps(_plain(value), indent=1, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
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

    logging.disable_progress_bar()  # those of huggingface_hub go with it
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:  # where the environment says it, it is not ours to say
        enable_progress_bars()


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


def duration(seconds: float) -> str:
    """`42 s`, `6 min 10 s`, `3 h 5 min`."""
    whole = round(seconds)
    if whole < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.2f} s"
    if whole < 5400:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Bytes for people: `1.8 GB` (10⁹ bytes)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= factor:
            return f"{count / factor:.3g} {unit}" if count < 1e12 else f"{count / 1e9:,.0f} GB"
    return f"{count:.0f} bytes"
