"""`opticnerve data check`, `show` and `convert`: look at the data before the model does, and write them anew."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from opticnerve.cli import tokens
from opticnerve.cli.guard import BAD_SAMPLES, guarded
from opticnerve.cli.options import OVERRIDES_HELP, JsonFlag, MediaOption
from opticnerve.cli.output import console_for, examples, is_recipe, print_json, read_recipe
from opticnerve.types import Conversation, DataError, OpticNerveError

if TYPE_CHECKING:
    from rich.console import Console

    from opticnerve.data.encode.tokenize import Encoded
    from opticnerve.recipe import DataSpec

    Entry = tuple[str, Any, Callable[[Conversation], Encoded] | None, str]  # name, data entry, encoder, train or test

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
CONVERT_EPILOG = examples(
    "opticnerve data convert train.json train.jsonl --media pictures/",
    "opticnerve data convert questions.tsv questions.parquet columns.question=query",
    "opticnerve data convert mix.json 'shards/mix-%05d.tar' --shard-size 1GB",
    note="Bad samples stop it, unless --skip-bad leaves them out.",
)
SourceArgument = Annotated[str, Argument(metavar="PATH|RECIPE", help="A data file or folder, or a recipe.")]
DataOverrides = Annotated[
    list[str] | None,
    Argument(help=f"{OVERRIDES_HELP} For a data file: keys of a data entry, such as [cyan]limit=100[/].",
                   metavar="[KEY=VALUE]..."),
]  # fmt: skip
FormatOption = Annotated[
    str, Option("--format", help="auto, captions, vqa, llava, chat, texts, instruction, completion, preference, hf, …")
]


@app.command("check", epilog=CHECK_EPILOG)
@guarded
def check(
    source: SourceArgument,
    overrides: DataOverrides = None,
    data_format: FormatOption = "auto",
    media: MediaOption = None,
    against: Annotated[
        list[str] | None, Option(help="Test data: what of it is in PATH, too? May be given several times.")
    ] = None,
    draw: Annotated[
        Path | None,
        Option(help="A folder: pictures of samples with the boxes that their words name, as many as listed."),
    ] = None,
    quick: Annotated[bool, Option("--quick", help="Open no picture and count no token.")] = False,
    max_listed: Annotated[int, Option(min=0, help="Examples listed for each kind of trouble.")] = 20,
    fail_on_leaks: Annotated[
        bool, Option("--fail-on-leaks", help="Exit code 3, too, if test data are trained on.")
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

    console, several = console_for(as_json), bool(is_recipe(source) or against)
    reports: dict[str, Any] = {}
    sides = {"train": Side(), "test": Side()}
    for name, spec, encoder, side in _entries(source, overrides or [], data_format, media, against or [], quick):
        left_out = Counter[str]()
        with _counting(console, name) as seen:
            reports[name] = run_check(
                _drawn(_samples(spec, left_out), spec, draw, max_listed), open_media=not quick, max_listed=max_listed,
                encode=encoder, on_progress=seen, side=sides[side],
            )  # fmt: skip
        reports[name].left_out = left_out
        if not as_json:
            if several:
                console.rule(name, align="left")
            reports[name].render(console)
    found, every = leaks(sides["train"], sides["test"], max_listed), reports.values()
    good = all(r.ok for r in every)
    blind = is_recipe(source) and any(r.good for r in every) and not any(r.images or r.audios for r in every)
    if as_json:
        warning = {"warning": NO_MEDIA} if blind else {}
        data = {name: r.to_dict() for name, r in reports.items()}
        whole = {"ok": good, **warning, "data": data, "leaks": found.to_dict()}
        print_json(whole if several else data[source])
    else:
        if blind:
            console.print(f"[bold red]warning:[/] {source}: {NO_MEDIA}", soft_wrap=True, highlight=False)
        for kind, title in found.NAMES:
            if (listed := getattr(found, kind)).count:
                print_listed(console, f"[bold red]{title}[/]: {listed.count:,}", listed)
    if not good or (fail_on_leaks and not found.ok):
        raise typer.Exit(BAD_SAMPLES)


@app.command("convert", epilog=CONVERT_EPILOG)
@guarded
def convert(
    source: Annotated[str, Argument(metavar="PATH", help="A data file or folder.")],
    out: Annotated[
        Path, Argument(metavar="OUT", help="A new file: .jsonl, .parquet or .tar; several with %05d in the name.")
    ],
    overrides: DataOverrides = None,
    data_format: FormatOption = "auto",
    media: MediaOption = None,
    skip_bad: Annotated[bool, Option("--skip-bad", help="Leave bad samples out, and count them.")] = False,
    shard_rows: Annotated[int | None, Option(min=1, help="Samples of a file, of several [100,000].")] = None,
    shard_size: Annotated[
        str | None, Option(help="Bytes after which the next file begins, such as 500MB [3GB].", metavar="SIZE")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write data of any layout as chat records: JSON lines, Parquet, or webdataset shards."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from opticnerve.data.dataset.convert import convert as write
    from opticnerve.data.dataset.load import stream_data

    try:
        size = None if shard_size is None else int(TypeAdapter(ByteSize).validate_python(shard_size))
    except ValidationError:
        problem = f"--shard-size {shard_size!r} is no size; write it as 500MB or 2GiB"
        raise OpticNerveError(problem, kind="wrong-type") from None

    bad: list[DataError] = []
    spec = _spec(source, data_format, media, overrides)
    left_out = Counter[str]()
    found = stream_data(spec, on_error=bad.append if skip_bad else None, left_out=left_out)
    count = write(found, out, shard_rows=shard_rows, shard_bytes=size)
    if as_json:
        print_json({"out": str(out), "samples": count, "left_out": len(bad), "by_where": left_out.total()})
        return
    console = console_for(False)
    console.print(f"{out}: {count:,} samples, {len(bad):,} bad ones left out", highlight=False, soft_wrap=True)
    _print_left_out(console, left_out)
    for error in bad[:20]:
        console.print(f"  {error}", style="dim", highlight=False, markup=False, soft_wrap=True)


@app.command("show", epilog=SHOW_EPILOG)
@guarded
def show(
    source: SourceArgument,
    overrides: DataOverrides = None,
    model: Annotated[str | None, Option(help="A model or recipe, for its tokenizer; default: the recipe.")] = None,
    index: Annotated[int | None, Option(help="The sample's place, from 0; -1 is the last.")] = None,
    sample_id: Annotated[str | None, Option("--id", help="The sample's id.")] = None,
    stage: Annotated[int, Option(min=0, help="Which stage's data and template, for a recipe.")] = 0,
    data_format: FormatOption = "auto",
    media: MediaOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the tokens of a sample as the model gets them: which are learned, which are read, where the picture is."""
    if index is not None and sample_id is not None:
        raise OpticNerveError("--index and --id both choose the sample; give one of the two", kind="conflict")
    if model is None and not is_recipe(source):
        raise OpticNerveError(
            "whose tokens? Give --model with a run's folder, a hub name, or a recipe", kind="missing-field"
        )

    from opticnerve.data.dataset.dataset import Joined
    from opticnerve.data.dataset.load import load_data
    from opticnerve.data.encode.tokenize import encode
    from opticnerve.data.media.images import described
    from opticnerve.language.chat_template import stage_template

    recipe = None
    if is_recipe(source):
        recipe = read_recipe(source, overrides)
        if stage >= len(recipe.stages):
            raise OpticNerveError(
                f"--stage {stage}: {source} has {len(recipe.stages)} stages, counted from 0", kind="out-of-range"
            )
        specs = recipe.stages[stage].data
    else:
        specs = [_spec(source, data_format, media, overrides)]
    left_out = Counter[str]()
    everything = Joined([load_data(spec, left_out=left_out) for spec in specs])
    conversation = tokens.choose(everything, index=index, sample_id=sample_id)
    processor = _processor_of(model) if model else _processor_of(source, overrides)
    template = stage_template(recipe.stages[stage].template, processor.tokenizer) if recipe else None
    encoded = encode(conversation, processor, template=template)
    if as_json:
        print_json(tokens.to_dict(encoded, tokens.pieces(encoded, processor)))
        return
    console = console_for(False)
    _print_left_out(console, left_out)
    for line in (conversation.where, *(described(i.source) for i in conversation.images)):
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    tokens.show(encoded, processor, console)


def _print_left_out(console: Console, left_out: Counter[str]) -> None:
    for text, count in left_out.items():
        line = f"{count:,} records left out by where: {text}"
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


def _entries(
    source: str, overrides: list[str], data_format: str, media: Path | None, against: list[str], quick: bool
) -> Iterator[Entry]:
    """Everything to check."""
    for path in against if is_recipe(source) else [source, *against]:
        elsewhere = path.startswith("starter/") or "://" in path or any(sign in path for sign in "{*?[")
        if not elsewhere and not Path(path).exists():
            raise OpticNerveError(f"there is no file or folder {path!r}", kind="missing-file")
    if not is_recipe(source):
        yield source, _spec(source, data_format, media, overrides), None, "train"
    else:
        yield from _of_recipe(source, overrides, quick)
    for path in against:
        yield path, _spec(path, data_format, media), None, "test"


def _of_recipe(source: str, overrides: list[str], quick: bool) -> Iterator[Entry]:
    recipe, processor, context = read_recipe(source, overrides), None, None
    # Dual encoders and classifiers cut long texts instead of refusing them.
    if not quick and recipe.model.KIND == "docked":
        from opticnerve.data.encode.tokenize import encode
        from opticnerve.language.chat_template import stage_template
        from opticnerve.plan.model import processor_for
        from opticnerve.plan.plan import context_length

        processor, context = processor_for(recipe), context_length(recipe)
    for i, stage in enumerate(recipe.stages):
        made = None
        if processor is not None:  # makes tokens of a sample, and refuses what the stage would refuse
            made = partial(
                encode, processor=processor, template=stage_template(stage.template, processor.tokenizer),
                max_length=stage.max_length or context,
            )  # fmt: skip
        for k, spec in enumerate(stage.data):
            yield f"stages.{i}.data.{k} ({stage.name}): {spec.path}", spec, made, "train"
    for i, task in enumerate(recipe.evaluate):
        yield f"evaluate.{i} ({task.name}): {task.data.path}", task.data, None, "test"


def _drawn(
    samples: Iterator[Conversation | DataError], spec: DataSpec, folder: Path | None, most: int
) -> Iterator[Conversation | DataError]:
    """The same samples; the last pictures of the first that name boxes or points are drawn into the folder."""
    from opticnerve.data.formats.boxes import FRAMES, boxes_in
    from opticnerve.data.media.marks import marked
    from opticnerve.data.media.open import open_image

    if folder is None:
        yield from samples
        return
    folder.mkdir(parents=True, exist_ok=True)
    frame, drawn = FRAMES[spec.boxes.frame if spec.boxes else "thousandths"], 0
    for sample in samples:
        if drawn < most and isinstance(sample, Conversation) and sample.images:
            found = boxes_in("\n".join(m.text for m in sample.messages))
            if found:
                marked(open_image(sample.images[-1].source), found, frame=frame).save(folder / f"{drawn:04d}.png")
                drawn += 1
        yield sample


def _samples(spec: DataSpec, left_out: Counter[str]) -> Iterator[Conversation | DataError]:
    """Good samples and bad ones as they come; a file that cannot be read at all is a bad one, too."""
    from opticnerve.data.dataset.load import stream_data

    waiting: list[DataError] = []
    found = stream_data(spec, on_error=waiting.append, left_out=left_out)
    conversation: Conversation | None
    while True:
        try:
            conversation = next(found, None)
        except DataError as e:
            conversation = None
            waiting.append(e)
        yield from waiting
        waiting.clear()
        if conversation is None:
            return
        yield conversation


def _spec(path: str, data_format: str, media: Path | None, overrides: list[str] | None = None) -> Any:
    from opticnerve.recipe.loading import data_entry
    from opticnerve.registry import known_formats

    if data_format not in (known := known_formats()):
        raise OpticNerveError(f"--format {data_format!r} is unknown; it is {', '.join(known)}", kind="unknown-name")
    return data_entry({"path": path, "format": data_format, "media": str(media) if media else None}, overrides or [])


def _processor_of(name: str, overrides: list[str] | None = None) -> Any:
    """The processor of a model or of a recipe's model; no weight is read."""
    if is_recipe(name):
        from opticnerve.plan.model import processor_for

        return processor_for(read_recipe(name, overrides))
    from opticnerve.inference.load import load_processor
    from opticnerve.models.checkpoint.source import resolve

    return load_processor(resolve(name, weights=False))


@contextlib.contextmanager
def _counting(console: Console, name: str) -> Iterator[Callable[[int], None]]:
    """A line that counts samples on a terminal."""
    if not console.is_terminal:
        yield lambda n: None
        return
    with console.status(f"checking {name}") as status:
        yield lambda n: status.update(f"checking {name}: {n:,} samples") if n % 100 == 0 else None
