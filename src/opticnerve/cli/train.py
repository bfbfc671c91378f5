"""`opticnerve train` and `opticnerve demo`: run a recipe; dock, align, instruct, evaluate and ask, from one command."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from opticnerve.cli.ask import show_picture
from opticnerve.cli.evaluate import show_results, without_samples
from opticnerve.cli.guard import Stopped, terminate_like_ctrl_c
from opticnerve.cli.options import RECIPE_HELP, JsonFlag, Overrides
from opticnerve.cli.output import (
    console_for,
    examples,
    is_recipe,
    load_answerer,
    print_json,
    quiet_libraries,
    read_recipe,
)
from opticnerve.types import Conversation, OpticNerveError

if TYPE_CHECKING:
    from rich.console import Console

    from opticnerve.recipe import Recipe

TRAIN_EPILOG = examples(
    "opticnerve train recipe.yaml",
    "opticnerve train recipe.yaml stages.0.steps=50 precision=fp32 --out runs/short",
    "opticnerve train --resume runs/short",
    note="Ctrl-C finishes the step, saves, and says how to go on; `--resume` then draws the curve of an unbroken run.",
)
DEMO_EPILOG = examples(
    "opticnerve demo",
    "opticnerve demo --out runs/second",
    "opticnerve demo --full --out runs/full",
    note="Needs no GPU and no model hub: weights and pictures come from packages on the Python package index.",
)


def train(
    recipe: Annotated[str, Argument(help=f"{RECIPE_HELP} With --resume a run's folder.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, Option(help="The run's folder.", show_default="runs/<recipe's name>")] = None,
    resume: Annotated[
        bool, Option("--resume", help="Go on where the run in the folder stopped, with the recipe that is in it.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train every stage of a recipe, evaluate, and write a run folder with its card."""
    recipe, out = _of_folder(recipe, out, resume=resume)
    read = read_recipe(recipe, overrides)
    if not read.stages:
        raise OpticNerveError(
            f"{recipe} has no stages, so there is nothing to train; add `stages:`, each with train and data",
            kind="empty",
        )
    folder = out or Path("runs") / read.name
    check_folder(folder, resume=resume)
    words = ["opticnerve", "train", recipe, *(overrides or []), *(["--out", str(out)] if out else [])]
    results = _run(read, folder, words, resume=resume, as_json=as_json)
    _finish(results, folder, as_json)


def _of_folder(recipe: str, out: Path | None, *, resume: bool) -> tuple[str, Path | None]:
    """The recipe's file and the run's folder, where a folder is named in the recipe's place. Raises OpticNerveError: it
    is no run's folder, or resuming was not asked for."""
    folder = Path(recipe)
    if not folder.is_dir() or (is_recipe(recipe) and not resume):
        return recipe, out
    kept = folder / "recipe.yaml"
    if not resume:
        raise OpticNerveError(
            f"{folder} is a folder; go on with the run in it by --resume, or name a recipe", kind="conflict"
        )
    if not kept.is_file():
        raise OpticNerveError(f"{folder} is no run's folder: there is no recipe.yaml in it", kind="missing-file")
    if out is not None and out.resolve() != folder.resolve():
        raise OpticNerveError(f"--resume {folder} goes on in that folder; leave out --out {out}", kind="conflict")
    return str(kept), folder


def _run(recipe: Recipe, folder: Path, command: list[str], *, resume: bool, as_json: bool) -> dict[str, Any]:
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


def _finish(results: dict[str, Any], folder: Path, as_json: bool) -> None:
    """The end summary."""
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
    """Finished work is never written over. Raises OpticNerveError: the folder holds something and `resume` was not
    asked for, or the reverse."""
    if int(os.environ.get("RANK", "0")):  # the first of several processes has looked, and may have begun to write
        return
    if folder.exists() and not folder.is_dir():
        raise OpticNerveError(f"{folder} is a file; name a folder with --out", kind="wrong-type")
    filled = folder.is_dir() and any(folder.iterdir())
    if filled and not resume:
        raise OpticNerveError(
            f"{folder} is not empty; go on with that run by --resume, or name another folder with --out",
            kind="exists-already",
        )
    if resume and not filled:
        raise OpticNerveError(
            f"there is no run in {folder} to resume; leave out --resume, or name its folder with --out",
            kind="missing-file",
        )


def demo(
    out: Annotated[Path, Option(help="The run's folder.")] = Path("runs/demo"),
    full: Annotated[bool, Option("--full", help="The longer recipe, whose result ships as `starter`.")] = False,
    resume: Annotated[bool, Option("--resume", help="Go on where an interrupted demo stopped.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Delete the run in the folder first.")] = False,
) -> None:
    """Make a model that sees, in minutes: EfficientNet-Lite0 docked onto SmolLM2-135M, trained on easy-VQA."""
    from opticnerve import recipe
    from opticnerve.starter.demo import recipe_path

    name = "starter-full" if full else "starter"
    _clear(out, resume=resume, overwrite=overwrite)
    read = recipe.load(recipe_path(name))
    if importlib.util.find_spec("tensorboard") is None:
        read = read.model_copy(update={"trackers": []})  # its curves stand on the card as well
    command = ["opticnerve", "demo", *(["--full"] if full else [])]
    command += ["--out", str(out)] if str(out) != "runs/demo" else []
    results = _run(read, out, command, resume=resume, as_json=False)

    console = console_for(False)
    show_results(results, console)
    picture = _three_questions(read, out, console)
    console.print(f"\nThe run card, with curves and sample answers: [bold]{out / 'card.md'}[/]", soft_wrap=True)
    console.print("What to type next:")
    own = "own-recipe.yaml"
    for line in (
        f'opticnerve ask {out} "what shape is in the image?" --image {picture}',
        f"opticnerve chat {out} --image {picture}",
        f"cp {recipe_path(name)} {own}   # then name your own data in it, and:",
        f"opticnerve data check {own} && opticnerve plan {own} && opticnerve train {own}",
    ):
        console.print(f"  [green]{line}[/]", soft_wrap=True, highlight=False)


def _clear(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Make room for the run; nothing that is no run folder is ever deleted."""
    if resume and overwrite:
        raise OpticNerveError(
            "--resume goes on with a run, --overwrite deletes it; give one of the two", kind="conflict"
        )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        if resume:
            raise OpticNerveError(f"there is no run in {out} to resume; leave out --resume", kind="missing-file")
        return
    if not (out / "recipe.yaml").is_file() and not (out / "stages").is_dir():
        raise OpticNerveError(f"{out} exists and is no run folder; name another one with --out", kind="exists-already")
    if overwrite:
        shutil.rmtree(out)
    elif not resume:
        state = "a finished run" if (out / "results.json").is_file() else "an unfinished run (--resume goes on with it)"
        raise OpticNerveError(
            f"{out} holds {state}; give --overwrite to delete it, or another folder with --out", kind="exists-already"
        )


def _three_questions(recipe: Recipe, out: Path, console: Console) -> Path:
    """Three questions about one picture that training has not seen, answered on screen; returns the picture's path."""
    from opticnerve.data.dataset.load import by_picture, load_data

    group = next(g for g in by_picture(load_data(recipe.evaluate[0].data)) if len(_varied(g)) == 3)
    picture = group[0].images[0].source
    assert isinstance(picture, Path)
    console.print(
        f"\n[bold]Three questions about a picture it has never seen[/]\n{picture}", soft_wrap=True, highlight=False
    )
    show_picture(picture, console)
    answerer = load_answerer(str(out))
    for conversation in _varied(group):
        console.print(f"\n[cyan]{conversation.prompt().messages[-1].text}[/]", highlight=False)
        for piece in answerer.stream(conversation, max_new_tokens=16):
            sys.stdout.write(piece)
            sys.stdout.flush()
        console.print(f"   [dim](right: {conversation.answer})[/]", highlight=False)
    return picture


def _varied(conversations: list[Conversation]) -> list[Conversation]:
    """Up to three questions of different types where there are such."""
    by_type = {c.meta.get("type"): c for c in reversed(conversations)}
    chosen = list(by_type.values())[:3]
    return chosen + [c for c in conversations if c not in chosen][: 3 - len(chosen)]
