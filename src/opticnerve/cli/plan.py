"""`opticnerve plan`: what a recipe will do and cost, before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from opticnerve.cli import tokens
from opticnerve.cli.options import RECIPE_HELP, JsonFlag, Overrides
from opticnerve.cli.output import console_for, examples, print_json, quiet_libraries, read_recipe, table_of
from opticnerve.common.units import format_bytes, format_duration

if TYPE_CHECKING:
    from rich.console import Console

    from opticnerve.plan.plan import Plan, StagePlan

EPILOG = examples(
    "opticnerve plan recipe.yaml",
    "opticnerve plan starter stages.0.batch_size=64",
    "opticnerve plan recipe.yaml --no-calibrate --json",
    note="Reads configurations and tokenizers, and no weights unless it calibrates.",
)


def plan(
    recipe: Annotated[str, Argument(help=RECIPE_HELP)],
    overrides: Overrides = None,
    calibrate: Annotated[
        bool | None,
        Option(
            "--calibrate/--no-calibrate",
            help="Load the weights and time one short batch of each stage.",
            show_default="where the weights are at hand",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show shapes, visual tokens, what trains, memory, time, a masked sample and warnings, before training."""
    read = read_recipe(recipe, overrides, without_data=True)
    console = console_for(as_json)
    with console.status("reading configurations"):
        from opticnerve.plan import plan as planning

        quiet_libraries()
        wanted = planning.weights_at_hand(read) if calibrate is None else calibrate
        dock = None
        if wanted:
            from opticnerve.models.vlm import build

            dock = build.dock_recipe
        made = planning.make(read, dock=dock)
    if as_json:
        sample = {}
        if made.sample is not None:
            sample["sample"] = tokens.to_dict(made.sample, tokens.pieces(made.sample, made.processor))
        print_json({**made.to_dict(), **sample})
    else:
        _render(made, console)


def _render(made: Plan, console: Console) -> None:
    """The plan for people."""
    from rich.text import Text

    title = f"{made.name} ({made.precision})"
    table = table_of(title, "part", "what", "gives", ">parameters")
    for row in made.shapes:
        count = f"{row.parameters:,}" if row.parameters else ""
        active = f", {row.active:,} active" if row.active < row.parameters else ""
        table.add_row(row.part, row.kind, row.output, count + active)
    console.print(table)
    if made.visual_tokens:
        of = f" of the {made.context:,} that the language model takes" if made.context else ""
        console.print(f"[bold]{made.visual_tokens:,}[/] {_per_piece(made)}{of}\n")
    for stage in made.stages:
        _stage(stage, console)
    if made.stages:
        console.print(_memory(made))
        device = made.device
        console.print(
            f"[dim]This device: {device['type']}, {device['cores']} cores, {format_bytes(device['free'])} free of "
            f"{format_bytes(device['memory'])}. Activations are an estimate.[/]\n",
            highlight=False,
        )
    if made.sample is not None:
        console.print("[bold]The first sample as the model gets it[/]")
        tokens.show(made.sample, made.processor, console)
        console.print()
    for remark in made.remarks:
        style = "bold yellow" if remark.level == "warning" else "dim"
        console.print(Text.assemble((f"{remark.level}:", style), " ", remark.text), soft_wrap=True)


def _per_piece(made: Plan) -> str:
    """What a picture (or, where there is no vision encoder, a window of sound) costs: the words behind the number."""
    vision_encoder = any(s.part == "picture" for s in made.shapes)
    tower, piece = ("image", "image") if vision_encoder else ("audio", "window of sound")
    [given] = [s.output for s in made.shapes if s.part == f"{tower}.connector"]
    if own_shape := given.startswith("up to "):
        given = given.removeprefix("up to ")
    soft = int(given.split(" ")[0])
    assert made.visual_tokens is not None
    if made.visual_tokens < soft:
        return f"token in the text and {soft:,} beside it per {piece},"
    most = ", at most," if own_shape or made.visual_tokens > soft else ""
    return f"{'visual ' if vision_encoder else ''}tokens per {piece}{most}"


def _stage(stage: StagePlan, console: Console) -> None:
    title = (
        f"Stage {stage.name}: {stage.trained:,} of {stage.total:,} parameters train ({stage.trained / stage.total:.2%})"
    )
    table = table_of("", "part", ">parameters", "", ">learning rate")
    for share in stage.shares:
        rate = f"{share.learning_rate:g}" if share.learning_rate is not None else ""
        word = "trained" if share.trained else "frozen"
        table.add_row(share.part, f"{share.parameters:,}", word, rate, style="bold" if share.trained else "dim")
    console.print(f"[bold]{title}[/]", highlight=False)
    console.print(table)
    data = stage.data
    if data.steps is not None:
        facts = [f"{data.steps:,} steps of {stage.batch_size}"]
        if data.samples:
            facts.append(f"{data.samples:,} samples, {stage.epochs:.3g} epochs")
        if data.left_out:
            facts.append(f"{data.left_out:,} records left out by where")
        if data.per_row > 1:
            facts.append(f"{data.per_row:.3g} samples to a packed row")
        if data.length:
            facts.append(f"{data.length} tokens a row on average, {round(data.supervised)} of them learned")
        console.print("; ".join(facts), highlight=False)
    if data.sources:
        sources = table_of("", "source", ">samples", ">share", ">epochs")
        for s in data.sources:
            sources.add_row(s.name, f"{s.examples:,}", f"{s.share:.1%}", f"{s.epochs:.3g}")
        console.print(sources)
    if stage.attention is not None:
        console.print(f"attention within packed rows: {stage.attention}", highlight=False)
    if stage.seconds is not None:
        console.print(
            f"time: about [bold]{format_duration(stage.seconds)}[/] [dim]({stage.timing})[/]", highlight=False
        )
    console.print()


def _memory(made: Plan) -> Any:
    table = table_of("Memory of a step", "", *(f">{stage.name}" for stage in made.stages))
    rows = {
        "Python and torch": "process", "weights": "weights", "gradients": "gradients", "optimizer": "optimizer",
    }  # fmt: skip
    if any(s.flops for s in made.stages):  # else none were counted, which a remark says
        rows |= {"activations": "activations", "  with gradient checkpointing": "activations_checkpointed"}
    for label, key in rows.items():
        table.add_row(label, *(format_bytes(getattr(s.memory, key)) for s in made.stages))
    totals = [
        (format_bytes(s.memory.total), "bold" if s.memory.total <= made.device["free"] else "bold red")
        for s in made.stages
    ]
    table.add_row("together", *(f"[{style}]{text}[/]" for text, style in totals))
    return table
