"""`opticnerve train`: run a recipe."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from opticnerve.cli.guard import Stopped, terminate_like_ctrl_c
from opticnerve.cli.output import (
    OVERRIDES_HELP,
    RECIPE_HELP,
    JsonFlag,
    console_for,
    examples,
    is_recipe,
    print_json,
    quiet_libraries,
    read_recipe,
)
from opticnerve.types import OpticNerveError

EPILOG = examples(
    "opticnerve train recipe.yaml",
    "opticnerve train recipe.yaml stages.0.steps=50 precision=fp32 --out runs/short",
    "opticnerve train --resume runs/short",
    note="Ctrl-C finishes the step, saves, and says how to go on; `--resume` then draws the curve of an unbroken run.",
)


def train(
    recipe: Annotated[str, typer.Argument(help=f"{RECIPE_HELP} With --resume a run's folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(help=OVERRIDES_HELP, metavar="[KEY=VALUE]...")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder.", show_default="runs/<recipe's name>")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run in the folder stopped, with the recipe that is in it.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train every stage of a recipe, evaluate, and write a run folder with its card."""
    recipe, out = of_folder(recipe, out, resume=resume)
    read = read_recipe(recipe, overrides)
    if not read.stages:
        raise OpticNerveError(
            f"{recipe} has no stages, so there is nothing to train; add `stages:`, each with train and data"
        )
    folder = out or Path("runs") / read.name
    check_folder(folder, resume=resume)
    words = ["opticnerve", "train", recipe, *(overrides or []), *(["--out", str(out)] if out else [])]
    results = run(read, folder, words, resume=resume, as_json=as_json)
    finish(results, folder, as_json)


def of_folder(recipe: str, out: Path | None, *, resume: bool) -> tuple[str, Path | None]:
    """The recipe's file and the run's folder, where a folder is named in the recipe's place.

    Raises:
        OpticNerveError: it is no run's folder, or resuming was not asked for.
    """
    folder = Path(recipe)
    if not folder.is_dir() or (is_recipe(recipe) and not resume):
        return recipe, out
    kept = folder / "recipe.yaml"
    if not resume:
        raise OpticNerveError(f"{folder} is a folder; go on with the run in it by --resume, or name a recipe")
    if not kept.is_file():
        raise OpticNerveError(f"{folder} is no run's folder: there is no recipe.yaml in it")
    if out is not None and out.resolve() != folder.resolve():
        raise OpticNerveError(f"--resume {folder} goes on in that folder; leave out --out {out}")
    return str(kept), folder


def run(recipe: Any, folder: Path, command: list[str], *, resume: bool, as_json: bool) -> dict[str, Any]:
    """Run the recipe; an interruption says what was saved and how to go on."""
    from opticnerve.runs.pipeline import run_recipe

    quiet_libraries()
    terminate_like_ctrl_c()
    try:
        results: dict[str, Any] = run_recipe(
            recipe, folder, resume=resume, command=shlex.join(command), console=console_for(as_json)
        )
    except KeyboardInterrupt as e:
        again = shlex.join(["opticnerve", "train", "--resume", str(folder)])
        saved = getattr(e, "checkpoint", None)
        kept = f"saved to {saved}" if saved else "finished stages are kept"
        raise Stopped(f"\nstopped; {kept}. Go on with:\n  {again}") from e
    return results


def finish(results: dict[str, Any], folder: Path, as_json: bool) -> None:
    """The end summary."""
    from opticnerve.cli.results import show_results, without_samples

    if as_json:
        print_json({"run": str(folder), "card": str(folder / "card.md"), **without_samples(results)})
        return
    console = console_for(False)
    show_results(results, console)
    console.print(f"\nThe run card: [bold]{folder / 'card.md'}[/]", soft_wrap=True)
    kind = (results.get("model") or {}).get("kind", "")
    if kind.startswith("dual"):
        use = f'opticnerve classify {folder} --image FILE --classes "cat, dog"'
        console.print(f"Use it: [green]{use}[/]", soft_wrap=True)
    elif not kind:
        console.print(f'Ask it: [green]opticnerve ask {folder} "what is in the image?" --image FILE[/]', soft_wrap=True)


def check_folder(folder: Path, *, resume: bool) -> None:
    """Finished work is never written over.

    Raises:
        OpticNerveError: the folder holds something and `resume` was not asked for, or the reverse.
    """
    if int(os.environ.get("RANK", "0")):  # the first of several processes has looked, and may have begun to write
        return
    if folder.exists() and not folder.is_dir():
        raise OpticNerveError(f"{folder} is a file; name a folder with --out")
    filled = folder.is_dir() and any(folder.iterdir())
    if filled and not resume:
        raise OpticNerveError(
            f"{folder} is not empty; go on with that run by --resume, or name another folder with --out"
        )
    if resume and not filled:
        raise OpticNerveError(
            f"there is no run in {folder} to resume; leave out --resume, or name its folder with --out"
        )
