"""`opticnerve compare`: three experiments, one command each."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from opticnerve.cli.guard import ERROR, Stopped, fail, guarded, terminate_like_ctrl_c
from opticnerve.cli.options import RECIPE_HELP, Overrides
from opticnerve.cli.output import console_for, examples, quiet_libraries, read_recipe

NOTE = (
    "Minutes on two cores. Finished rows are kept: type the same command again to go on after Ctrl-C, to add seeds, or "
    "to run what failed. How to read the report: docs/compare.md."
)

app = typer.Typer(
    help="Compare designs under one budget, with seeds and intervals: when to fuse, which connector, why stages.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeName = Annotated[str, Option("--recipe", help=f"What is varied. {RECIPE_HELP}")]
Out = Annotated[Path | None, Option(help="Folder of the rows.", show_default="runs/compare-<experiment>")]
Folder = Annotated[Path | None, Option(help="Folder of the report.", show_default="<out>/report")]
Seeds = Annotated[int | None, Option(min=1, help="Trainings of each row.", show_default="the budget's")]
Scale = Annotated[float, Option(help="Multiplies the number of steps of every stage.")]
Rows = Annotated[str | None, Option(help="Names of rows, with commas: run these alone.", show_default="all")]
Quick = Annotated[bool, Option("--quick", help="One or two steps each, to see that it runs.")]
Keep = Annotated[bool, Option("--keep-models", help="Keep the weights of finished rows on disk.")]
Text = Annotated[str, Option(help="The text encoder of the classifiers and the dual encoder.")]


TEXT = "starter/minilm"


@app.command("fusion", epilog=examples("opticnerve compare fusion", "opticnerve compare fusion --scale 3", note=NOTE))
@guarded
def fusion(
    overrides: Overrides = None, recipe: RecipeName = "starter", out: Out = None, report: Folder = None,
    seeds: Seeds = None, scale: Scale = 1.0, rows: Rows = None, quick: Quick = False, keep_models: Keep = False,
    text: Text = TEXT,
) -> None:  # fmt: skip
    """When to fuse: early, intermediate and late classifiers, contrastive zero-shot, two kinds of VLM."""
    _run("fusion", **locals())


@app.command("connectors", epilog=examples("opticnerve compare connectors --rows mlp,qformer", note=NOTE))
@guarded
def connectors(
    overrides: Overrides = None, recipe: RecipeName = "starter", out: Out = None, report: Folder = None,
    seeds: Seeds = None, scale: Scale = 1.0, rows: Rows = None, quick: Quick = False, keep_models: Keep = False,
) -> None:  # fmt: skip
    """Which connector: accuracy against visual tokens, parameters and seconds."""
    _run("connectors", **locals())


@app.command("stages", epilog=examples("opticnerve compare stages --seeds 3", note=NOTE))
@guarded
def stages(
    overrides: Overrides = None, recipe: RecipeName = "starter", out: Out = None, report: Folder = None,
    seeds: Seeds = None, scale: Scale = 1.0, rows: Rows = None, quick: Quick = False, keep_models: Keep = False,
) -> None:  # fmt: skip
    """Why stages: forgetting, cost and convergence of six ways to train the same model."""
    _run("stages", **locals())


def _run(
    name: str, overrides: list[str] | None, recipe: str, out: Path | None, report: Path | None, seeds: int | None,
    scale: float, rows: str | None, quick: bool, keep_models: bool, text: str = TEXT,
) -> None:  # fmt: skip
    read = read_recipe(recipe, overrides)
    from opticnerve.compare.base import Base
    from opticnerve.compare.experiment import run

    experiment = importlib.import_module(f"opticnerve.compare.{name}").EXPERIMENT
    options: dict[str, Any] = {
        "--recipe": recipe if recipe != "starter" else None, "--out": out, "--report": report, "--seeds": seeds,
        "--scale": f"{scale:g}" if scale != 1 else None, "--rows": rows,
        "--text": text if text != TEXT else None,
    }  # fmt: skip
    command = shlex.join([
        "opticnerve", "compare", name, *(overrides or []),
        *(word for k, v in options.items() if v is not None for word in (k, str(v))),
        *(["--quick"] if quick else []), *(["--keep-models"] if keep_models else []),
    ])  # fmt: skip
    from opticnerve.starter.demo import packaged

    where = "packaged recipe" if recipe in packaged() else "recipe"
    base = Base(read, text=text, name=f"the {where} {Path(recipe).name}")
    console = console_for(False)
    quiet_libraries()
    terminate_like_ctrl_c()
    try:
        done = run(
            experiment, base, out or Path("runs") / f"compare-{name}", report=report, seeds=seeds, scale=scale,
            only=[r.strip() for r in rows.split(",")] if rows else None, quick=quick, keep_models=keep_models,
            command=command, console=console,
        )  # fmt: skip
    except KeyboardInterrupt as e:
        raise Stopped(f"\nstopped; finished rows are kept, and the begun one is saved. Go on with:\n  {command}") from e
    if done.report is not None:
        console.print(f"\nThe report: [bold]{done.report}[/]", soft_wrap=True, highlight=False)
    if done.failures:
        listed = "\n".join(f"  {o.row.name}, seed {o.seed}: {o.error}" for o in done.failures)
        fail(
            f"{len(done.failures)} of {len(done.outcomes)} rows failed:\n{listed}\nMore is in each one's error.txt and "
            f"log.txt, in {done.failures[0].folder.parent.parent}; type the command again to run them."
        )
        raise typer.Exit(ERROR)


SWEEP_EPILOG = examples(
    "opticnerve sweep recipe.yaml stages.0.train.connector=1e-3,3e-3",
    "opticnerve sweep starter stages.1.lora.rank=4,16 seed=0 --seeds 2",
    note="Every combination is one run. Finished runs are kept: type the same command again after Ctrl-C, or with more "
    "values. With cache_features in the recipe all runs share one store of features.",
)


def sweep(
    recipe: Annotated[str, Argument(help=RECIPE_HELP, show_default=False)],
    values: Annotated[
        list[str],
        Argument(help="Settings with their values, commas between: [cyan]KEY=VALUE,VALUE[/].", metavar="KEY=VALUES..."),
    ],
    out: Annotated[Path | None, Option(help="Folder of the runs.", show_default="runs/sweep-<recipe>")] = None,
    seeds: Annotated[int, Option(min=1, help="Trainings of each setting.")] = 1,
    keep_models: Keep = False,
) -> None:
    """Train a recipe with each of some settings, under one budget, and write one table."""
    from opticnerve.compare.sweep import run_sweep

    console, folder = console_for(False), out or Path("runs") / f"sweep-{Path(recipe).stem}"
    command = shlex.join([
        "opticnerve", "sweep", recipe, *values, *(["--out", str(out)] if out else []),
        *(["--seeds", str(seeds)] if seeds > 1 else []), *(["--keep-models"] if keep_models else []),
    ])  # fmt: skip
    quiet_libraries()
    terminate_like_ctrl_c()
    try:
        path, results = run_sweep(
            lambda overrides: read_recipe(recipe, overrides), values, folder, seeds=seeds, keep_models=keep_models,
            command=command, console=console,
        )  # fmt: skip
    except KeyboardInterrupt as e:
        raise Stopped(f"\nstopped; finished runs are kept, and the begun one is saved. Go on with:\n  {command}") from e
    console.print(f"\nThe table: [bold]{path}[/]", soft_wrap=True, highlight=False)
    if failed := [r for r in results if r.error is not None]:
        fail("\n".join(f"{r.row.name}, seed {r.seed}: {r.error}" for r in failed))
        raise typer.Exit(ERROR)
