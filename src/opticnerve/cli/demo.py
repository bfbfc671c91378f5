"""`opticnerve demo`: dock, align, instruct, evaluate and ask, from one command."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from opticnerve.cli.output import console_for, examples
from opticnerve.cli.train import run
from opticnerve.types import Conversation, OpticNerveError

EPILOG = examples(
    "opticnerve demo",
    "opticnerve demo --out runs/second",
    "opticnerve demo --full --out runs/full",
    note="Needs no GPU and no model hub: weights and pictures come from packages on the Python package index.",
)


def demo(
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/demo"),
    full: Annotated[bool, typer.Option("--full", help="The longer recipe, whose result ships as `starter`.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted demo stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run in the folder first.")] = False,
) -> None:
    """Make a model that sees, in minutes: EfficientNet-Lite0 docked onto SmolLM2-135M, trained on easy-VQA."""
    from opticnerve import recipe
    from opticnerve.starter.demo import recipe_path

    name = "starter-full" if full else "starter"
    _clear(out, resume=resume, overwrite=overwrite)
    read = recipe.load(recipe_path(name))
    if importlib.util.find_spec("tensorboard") is None:
        read = read.model_copy(update={"trackers": []})  # its curves stand on the card as well
    command = [
        "opticnerve",
        "demo",
        *(["--full"] if full else []),
        *(["--out", str(out)] if str(out) != "runs/demo" else []),
    ]
    results = run(read, out, command, resume=resume, as_json=False)

    from opticnerve.cli.results import show_results

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
        raise OpticNerveError("--resume goes on with a run, --overwrite deletes it; give one of the two")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        if resume:
            raise OpticNerveError(f"there is no run in {out} to resume; leave out --resume")
        return
    if not (out / "recipe.yaml").is_file() and not (out / "stages").is_dir():
        raise OpticNerveError(f"{out} exists and is no run folder; name another one with --out")
    if overwrite:
        shutil.rmtree(out)
    elif not resume:
        state = "a finished run" if (out / "results.json").is_file() else "an unfinished run (--resume goes on with it)"
        raise OpticNerveError(f"{out} holds {state}; give --overwrite to delete it, or another folder with --out")


def _three_questions(recipe: Any, out: Path, console: Any) -> Path:
    """Three questions about one picture that training has not seen, answered on screen; returns the picture's path."""
    from opticnerve.data.dataset.load import by_picture, load_data
    from opticnerve.inference.generate import Answerer
    from opticnerve.inference.load import load_model

    group = next(g for g in by_picture(load_data(recipe.evaluate[0].data)) if len(_varied(g)) == 3)
    picture = group[0].images[0].source
    assert isinstance(picture, Path)
    console.print(
        f"\n[bold]Three questions about a picture it has never seen[/]\n{picture}", soft_wrap=True, highlight=False
    )
    if console.is_terminal:
        from opticnerve.cli.picture import draw

        console.print(draw(picture, columns=24))
    answerer = Answerer(*load_model(out))
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
