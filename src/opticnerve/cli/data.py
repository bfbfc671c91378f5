"""`opticnerve data check` and `opticnerve data show`: look at the data before the model does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opticnerve.cli.guard import BAD_SAMPLES, guarded
from opticnerve.cli.output import OVERRIDES_HELP, JsonFlag, console_for, examples, is_recipe, print_json, read_recipe
from opticnerve.types import Conversation, DataError, OpticNerveError

if TYPE_CHECKING:
    from opticnerve.data.encode.tokenize import Encoded

app = typer.Typer(
    help="Look at data before a model does: what is wrong with it, and what is learned.", no_args_is_help=True
)
CHECK_EPILOG = examples(
    "opticnerve data check captions.jsonl --media pictures/",
    "opticnerve data check recipe.yaml stages.0.data.0.limit=1000",
    "opticnerve data check conversations.json --format llava --json",
    "opticnerve data check train.jsonl --against test.jsonl --fail-on-leaks",
    note="Ends with exit code 3 if it finds samples that training would refuse.",
)
SHOW_EPILOG = examples(
    "opticnerve data show recipe.yaml --index 7",
    "opticnerve data show captions.jsonl --model recipe.yaml",
    "opticnerve data show conversations.json --model runs/demo --id sample-12",
    note="With a recipe the tokenizer alone is loaded, no weights.",
)
SourceArgument = Annotated[str, typer.Argument(metavar="PATH|RECIPE", help="A data file or folder, or a recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help=f"{OVERRIDES_HELP} For a data file: keys of a data entry, such as [cyan]limit=100[/].",
                   metavar="[KEY=VALUE]..."),
]  # fmt: skip
FormatOption = Annotated[
    str, typer.Option("--format", help="auto, captions, vqa, llava, chat, completion, preference, hf or webdataset.")
]
MediaOption = Annotated[Path | None, typer.Option(help="The folder that pictures' paths start from.")]


@app.command("check", epilog=CHECK_EPILOG)
@guarded
def check(
    source: SourceArgument,
    overrides: Overrides = None,
    data_format: FormatOption = "auto",
    media: MediaOption = None,
    against: Annotated[
        list[str] | None, typer.Option(help="Test data: what of it is in PATH, too? May be given several times.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Open no picture and count no token.")] = False,
    max_listed: Annotated[int, typer.Option(min=0, help="Examples listed for each kind of trouble.")] = 20,
    fail_on_leaks: Annotated[
        bool, typer.Option("--fail-on-leaks", help="Exit code 3, too, if test data are trained on.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Go through all samples and list what is wrong with them, before training does.

    For a recipe: all data of its stages and its evaluation, with the lengths in tokens and the length that fits, and
    what of the evaluation is in the training data.
    """
    from opticnerve.data.check.leakage import Side, leaks
    from opticnerve.data.check.report import check as run_check
    from opticnerve.data.check.report import print_listed
    from opticnerve.data.dataset.dataset import NO_MEDIA

    console = console_for(as_json)
    reports: dict[str, Any] = {}
    sides = {"train": Side(), "test": Side()}
    for name, spec, encoder, side in _entries(source, overrides or [], data_format, media, against or [], quick):
        with _counting(console, name) as seen:
            reports[name] = run_check(
                _samples(spec), open_media=not quick, max_listed=max_listed, encode=encoder,
                on_progress=seen, side=sides[side],
            )  # fmt: skip
        if not as_json:
            if is_recipe(source) or against:
                console.rule(name, align="left")
            reports[name].render(console)
    blind = (
        is_recipe(source)
        and not any(r.images or r.audios for r in reports.values())
        and any(r.good for r in reports.values())
    )
    if blind and not as_json:
        console.print(f"[bold red]warning:[/] {source}: {NO_MEDIA}", soft_wrap=True, highlight=False)
    found = leaks(sides["train"], sides["test"], max_listed)
    if not as_json:
        for kind, title in found.NAMES:
            if (listed := getattr(found, kind)).count:
                print_listed(console, f"[bold red]{title}[/]: {listed.count:,}", listed)
    good = all(r.ok for r in reports.values())
    if as_json:
        several = is_recipe(source) or against
        whole = {
            "ok": good,
            **({"warning": NO_MEDIA} if blind else {}),
            "data": {name: r.to_dict() for name, r in reports.items()},
            "leaks": found.to_dict(),
        }
        print_json(whole if several else next(iter(reports.values())).to_dict())
    if not good or (fail_on_leaks and not found.ok):
        raise typer.Exit(BAD_SAMPLES)


@app.command("show", epilog=SHOW_EPILOG)
@guarded
def show(
    source: SourceArgument,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="A model or recipe, for its tokenizer; default: the recipe.")
    ] = None,
    index: Annotated[int | None, typer.Option(help="The sample's place, from 0; -1 is the last.")] = None,
    sample_id: Annotated[str | None, typer.Option("--id", help="The sample's id.")] = None,
    stage: Annotated[int, typer.Option(min=0, help="Which stage's data and template, for a recipe.")] = 0,
    data_format: FormatOption = "auto",
    media: MediaOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the tokens of a sample as the model gets them: which are learned, which are read, where the picture is."""
    if index is not None and sample_id is not None:
        raise OpticNerveError("--index and --id both choose the sample; give one of the two")
    if model is None and not is_recipe(source):
        raise OpticNerveError("whose tokens? Give --model with a run's folder, a hub name, or a recipe")

    from opticnerve.cli import tokens
    from opticnerve.cli.places import processor_of
    from opticnerve.data.dataset.dataset import Joined
    from opticnerve.data.dataset.load import load_data
    from opticnerve.data.encode.tokenize import encode
    from opticnerve.data.media.images import described
    from opticnerve.language.chat_template import stage_template

    recipe = None
    if is_recipe(source):
        recipe = read_recipe(source, overrides)
        if stage >= len(recipe.stages):
            raise OpticNerveError(f"--stage {stage}: {source} has {len(recipe.stages)} stages, counted from 0")
        specs = recipe.stages[stage].data
    else:
        specs = [_spec(source, data_format, media, overrides)]
    everything = Joined([load_data(spec) for spec in specs])
    conversation = tokens.choose(everything, index=index, sample_id=sample_id)
    processor = processor_of(model) if model else processor_of(source, overrides)
    template = stage_template(recipe.stages[stage].template, processor.tokenizer) if recipe else None
    encoded = encode(conversation, processor, template=template)
    found = tokens.pieces(encoded, processor)
    if as_json:
        print_json(tokens.to_dict(encoded, found))
        return
    console = console_for(False)
    for line in (conversation.where, *(described(i.source) for i in conversation.images)):
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    console.print(tokens.show(found), "", tokens.legend(), tokens.counts(encoded, processor), sep="\n", highlight=False)


def _entries(
    source: str, overrides: list[str], data_format: str, media: Path | None, against: list[str], quick: bool
) -> Iterator[tuple[str, Any, Callable[[Conversation], Encoded] | None, str]]:
    """(name, data entry, encoder, train or test) of everything to check."""
    for path in against if is_recipe(source) else [source, *against]:
        if not path.startswith("starter/") and not any(sign in path for sign in "{*?[") and not Path(path).exists():
            raise OpticNerveError(f"there is no file or folder {path!r}")
    if not is_recipe(source):
        yield source, _spec(source, data_format, media, overrides), None, "train"
    else:
        yield from _of_recipe(source, overrides, quick)
    for path in against:
        yield path, _spec(path, data_format, media), None, "test"


def _of_recipe(
    source: str, overrides: list[str], quick: bool
) -> Iterator[tuple[str, Any, Callable[[Conversation], Encoded] | None, str]]:
    recipe = read_recipe(source, overrides)
    encoder = None
    # Dual encoders and classifiers cut long texts instead of refusing them.
    if not quick and recipe.model.KIND == "docked":
        from opticnerve.plan.plan import processor_for

        encoder = _encoder(processor_for(recipe), _context(recipe))
    for i, stage in enumerate(recipe.stages):
        for k, spec in enumerate(stage.data):
            made = encoder(stage) if encoder else None
            yield f"stages.{i}.data.{k} ({stage.name}): {spec.path}", spec, made, "train"
    for i, task in enumerate(recipe.evaluate):
        yield f"evaluate.{i} ({task.name}): {task.data.path}", task.data, None, "test"


def _samples(spec: Any) -> Iterator[Conversation | DataError]:
    """Good samples and bad ones as they come; a file that cannot be read at all is a bad one, too."""
    from opticnerve.data.dataset.load import stream_data

    waiting: list[DataError] = []
    found = stream_data(spec, on_error=waiting.append)
    ended = False
    while not ended:
        conversation = None
        try:
            conversation = next(found, None)
        except DataError as e:
            waiting.append(e)
        ended = conversation is None
        yield from waiting
        waiting.clear()
        if conversation is not None:
            yield conversation


def _spec(path: str, data_format: str, media: Path | None, overrides: list[str] | None = None) -> Any:
    from opticnerve.data.dataset.read import FORMATS
    from opticnerve.recipe.loading import data_entry

    if data_format not in FORMATS:
        raise OpticNerveError(f"--format {data_format!r} is unknown; it is {', '.join(FORMATS)}")
    return data_entry({"path": path, "format": data_format, "media": str(media) if media else None}, overrides or [])


def _context(recipe: Any) -> int | None:
    from opticnerve.plan.plan import context_length

    return context_length(recipe)


def _encoder(processor: Any, context: int | None) -> Callable[[Any], Callable[[Conversation], Encoded]]:
    """For a stage: the function that makes tokens of a sample, and refuses what the stage would refuse."""
    from opticnerve.data.encode.tokenize import encode
    from opticnerve.language.chat_template import stage_template

    def of_stage(stage: Any) -> Callable[[Conversation], Encoded]:
        limit, template = stage.max_length or context, stage_template(stage.template, processor.tokenizer)
        return lambda c: encode(c, processor, template=template, max_length=limit)

    return of_stage


@contextlib.contextmanager
def _counting(console: Any, name: str) -> Iterator[Callable[[int], None]]:
    """A line that counts samples on a terminal."""
    if not console.is_terminal:
        yield lambda n: None
        return
    with console.status(f"checking {name}") as status:
        yield lambda n: status.update(f"checking {name}: {n:,} samples") if n % 100 == 0 else None
