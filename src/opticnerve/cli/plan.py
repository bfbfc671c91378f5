"""`opticnerve plan`: what a recipe will do and cost, before it runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from opticnerve.cli.output import (
    OVERRIDES_HELP,
    RECIPE_HELP,
    JsonFlag,
    console_for,
    duration,
    examples,
    print_json,
    quiet_libraries,
    read_recipe,
    size,
)  # fmt: skip

EPILOG = examples(
    "opticnerve plan recipe.yaml",
    "opticnerve plan starter stages.0.batch_size=64",
    "opticnerve plan recipe.yaml --no-calibrate --json",
    note="Reads configurations and tokenizers, and no weights unless it calibrates.",
)


def plan(
    recipe: Annotated[str, typer.Argument(help=RECIPE_HELP)],
    overrides: Annotated[list[str] | None, typer.Argument(help=OVERRIDES_HELP, metavar="[KEY=VALUE]...")] = None,
    calibrate: Annotated[
        bool | None,
        typer.Option(
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
        result = made.to_dict()
        if made.sample is not None:
            from opticnerve.cli import tokens

            result["sample"] = tokens.to_dict(made.sample, tokens.pieces(made.sample, made.processor))
        print_json(result)
        return
    render(made, console)


def render(made: Any, console: Any) -> None:
    """The plan for people."""
    console.print(_shapes(made))
    if made.visual_tokens:
        of = f" of the {made.context:,} that the language model takes" if made.context else ""
        console.print(f"[bold]{made.visual_tokens:,}[/] {_per_piece(made)}{of}\n")
    for stage in made.stages:
        _stage(stage, console)
    if made.stages:
        console.print(_memory(made))
        device = made.device
        console.print(
            f"[dim]This device: {device['type']}, {device['cores']} cores, {size(device['free'])} free of "
            f"{size(device['memory'])}. Activations are an estimate.[/]\n",
            highlight=False,
        )
    if made.sample is not None:
        from opticnerve.cli import tokens

        console.print("[bold]The first sample as the model gets it[/]")
        found = tokens.pieces(made.sample, made.processor)
        console.print(
            tokens.show(found), tokens.legend(), tokens.counts(made.sample, made.processor), sep="\n", highlight=False
        )
        console.print()
    for remark in made.remarks:
        from rich.text import Text

        style = "bold yellow" if remark.level == "warning" else "dim"
        console.print(Text.assemble((f"{remark.level}:", style), " ", remark.text), soft_wrap=True)


def _per_piece(made: Any) -> str:
    """What a picture (or, where there is no vision encoder, a window of sound) costs: the words behind the number."""
    vision_encoder = any(s.part == "picture" for s in made.shapes)
    tower, piece = ("image", "image") if vision_encoder else ("audio", "window of sound")
    [soft] = [int(s.output.split(" ")[0]) for s in made.shapes if s.part == f"{tower}.connector"]
    if made.visual_tokens < soft:
        return f"token in the text and {soft:,} beside it per {piece},"
    most = ", at most," if made.visual_tokens > soft else ""
    return f"{'visual ' if vision_encoder else ''}tokens per {piece}{most}"


def _shapes(made: Any) -> Any:
    from rich.table import Table

    table = Table(title=f"{made.name} ({made.precision})", title_justify="left", title_style="bold")
    for column, side in (("part", "left"), ("what", "left"), ("gives", "left"), ("parameters", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for row in made.shapes:
        table.add_row(row.part, row.kind, row.output, f"{row.parameters:,}" if row.parameters else "")
    return table


def _stage(stage: Any, console: Any) -> None:
    from rich.table import Table

    title = (
        f"Stage {stage.name}: {stage.trained:,} of {stage.total:,} parameters train ({stage.trained / stage.total:.2%})"
    )
    table = Table()
    for column, side in (("part", "left"), ("parameters", "right"), ("", "left"), ("learning rate", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
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
        if data.per_row > 1:
            facts.append(f"{data.per_row:.3g} samples to a packed row")
        if data.length:
            facts.append(f"{data.length} tokens a row on average, {round(data.supervised)} of them learned")
        console.print("; ".join(facts), highlight=False)
    if stage.seconds is not None:
        console.print(f"time: about [bold]{duration(stage.seconds)}[/] [dim]({stage.timing})[/]", highlight=False)
    console.print()


def _memory(made: Any) -> Any:
    from rich.table import Table

    table = Table(title="Memory of a step", title_justify="left", title_style="bold")
    table.add_column("")
    for stage in made.stages:
        table.add_column(stage.name, justify="right")
    rows = {
        "Python and torch": "process", "weights": "weights", "gradients": "gradients", "optimizer": "optimizer",
        "activations": "activations", "  with gradient checkpointing": "activations_checkpointed",
    }  # fmt: skip
    for label, key in rows.items():
        table.add_row(label, *(size(getattr(s.memory, key)) for s in made.stages))
    totals = [
        (size(s.memory.total), "bold" if s.memory.total <= made.device["free"] else "bold red") for s in made.stages
    ]
    table.add_row("together", *(f"[{style}]{text}[/]" for text, style in totals))
    return table
