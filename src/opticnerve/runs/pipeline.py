"""A whole run: dock, measure, train each stage, measure again, write the card. Each piece done is kept at once."""

from __future__ import annotations

import os
import platform
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import psutil
import torch
import transformers
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from opticnerve.common.progress import Waiting
from opticnerve.common.shards import to_device
from opticnerve.common.version import __version__
from opticnerve.data.dataset.load import load_data
from opticnerve.distributed.collectives import keeps_shards, on_main, sequence_parallel
from opticnerve.evaluation.evaluate import evaluate_model
from opticnerve.evaluation.forgetting import forgetting_entry, perplexity
from opticnerve.inference.generate import Answerer
from opticnerve.inference.load import default_device
from opticnerve.language.sharded import loading_onto_shards
from opticnerve.models.family import Family, build
from opticnerve.plan.plan import within_budgets
from opticnerve.recipe import LoraSpec, ModelSpec, Recipe, Stage
from opticnerve.runs.card.card import write_card
from opticnerve.runs.card.warnings import warnings_of
from opticnerve.runs.folder import (
    RESULTS,
    Results,
    finish_stage,
    finished_stage,
    keep_recipe,
    lengthen,
    lengthened_stages,
    publish,
    stage_folder,
)
from opticnerve.train.engine import make_accelerator
from opticnerve.train.loop import run_stage
from opticnerve.train.throughput import peak_memory
from opticnerve.types import Conversation, OpticNerveError


def run_recipe(
    recipe: Recipe, run_dir: Path, *, resume: bool = False, command: str = "", console: Console | None = None
) -> dict[str, Any]:
    """Train every stage of a recipe, evaluate, and fill the run folder; returns what `results.json` holds.

    Args:
        resume: go on where an earlier call with the same recipe stopped: finished stages are loaded, a begun one
            continues from its newest checkpoint, as does the last one that was begun where the recipe makes it longer.
        command: what the user typed, for the card.
        console: a rich console for progress, or None for silence.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, after saving. OpticNerveError: anything a user can put right.
    """
    started = time.perf_counter()
    if not recipe.stages:
        raise OpticNerveError("the recipe has no stages; add at least one under `stages:`", kind="empty")
    run_dir.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(recipe, run_dir)
    main, shared = accelerator.is_main_process, keeps_shards() and accelerator.num_processes > 1
    if shared:
        check_shareable(recipe)
        if torch.accelerator.is_available() and accelerator.device.type == "cpu":
            raise OpticNerveError(
                "fsdp_state_dict_type: SHARDED_STATE_DICT: transformers reads shards onto accelerators where there are "
                "some; hide them from processes of the CPU (CUDA_VISIBLE_DEVICES=)",
                kind="unsupported",
            )
    recipe = on_main(accelerator, partial(keep_recipe, recipe, run_dir, resume))
    longer = on_main(accelerator, partial(lengthened_stages, recipe, run_dir))
    results = Results(run_dir / RESULTS, fresh=not resume, writes=main)

    stages, said = _settle_budgets(recipe, accelerator)
    if console is not None:
        for text in said:
            console.print(text, highlight=False, soft_wrap=True)

    # What is wrong with the questions, or with the tokenizer, is found now and not when all is trained.
    for spec in recipe.evaluate:
        load_data(spec.data)
    with loading_onto_shards(accelerator.num_processes if shared else 1):
        dock = build(recipe)
    if main:
        with TemporaryDirectory() as scratch:
            dock.processor.save_pretrained(scratch)
    if console is not None:
        console.print(dock.headline())
    results.data |= {"model": dock.describe(), "machine": machine(), "opticnerve": __version__, "seed": recipe.seed}
    if not (resume and results.data.get("command")):  # the card says how the run was begun
        results.data["command"] = command
    elif longer:
        results.data["command"] += f"\n{command}"
    seconds = results.data.setdefault("seconds", {})
    results.write()

    # Before training: what the language model knows; of a dual encoder, what fresh projections give.
    to_device(dock.model, accelerator.device)
    forgets = main and recipe.forgetting and dock.model.language_model is not None
    if forgets:
        _measure_text(dock, results, "untouched", console, recipe.forgetting_tokens)
    if main and dock.BASELINE and "untrained" not in results.data:
        results.set("untrained", evaluate_model(dock.model, dock.processor, recipe.evaluate, console=console)["tasks"])

    trained: set[str] = set()
    for number, stage in enumerate(stages):
        folder = stage_folder(run_dir, recipe, number)
        going_on = resume and number not in longer
        done = on_main(accelerator, partial(finished_stage, folder)) if going_on else None
        if done is not None:
            trained |= dock.load_stage(folder)
        else:
            result = run_stage(
                dock, recipe, stage, folder, trained_before=trained, resume=resume, console=console,
                accelerator=accelerator, ready_to_train=partial(lengthen, recipe, run_dir, folder),
                score=partial(_score, dock, recipe),
            )  # fmt: skip
            known = results.data.get("forgetting", [])
            results.data["forgetting"] = [e for e in known if e["after"] != stage.name]
            done = finish_stage(folder, result.to_dict()) if main else {}
        if main:
            seconds[stage.name] = done["seconds"]
            results.set("stages", [s for s in results.data.get("stages", []) if s["name"] != stage.name] + [done])
            if forgets:
                _measure_text(dock, results, stage.name, console, recipe.forgetting_tokens)
            write_card(run_dir)
    if not main:
        return results.data

    publish(run_dir, folder)
    dock.model.eval()
    begun = time.perf_counter()
    found = evaluate_model(dock.model, dock.processor, recipe.evaluate, console=console, run_dir=run_dir)
    seconds["evaluate"] = time.perf_counter() - begun
    seconds["total"] = seconds.get("total", 0.0) + time.perf_counter() - started
    results.data |= found | {"peak_memory_bytes": peak_memory()}
    results.write()
    write_card(run_dir)
    if console is not None:
        for title, text in warnings_of(results.data):
            console.print(f"\n[bold red]WARNING: {title}[/]\n{text}\n", highlight=False, soft_wrap=True)
    if recipe.trackers:
        accelerator.end_training()
    return results.data


def check_shareable(recipe: Recipe) -> None:
    """See that a run can go with a language model that is whole nowhere.

    Raises:
        OpticNerveError: something in the recipe wants it whole, or was not tried; the message says what to do.
    """
    model, later = recipe.model, "ask afterwards: opticnerve eval RUN --recipe RECIPE"
    problems = {
        "forgetting: answers are generated by one process; write forgetting: false": recipe.forgetting,
        f"evaluate: answers are generated by one process; leave it out, and {later}": bool(recipe.evaluate),
        f"model: {model.WHAT} was not tried; a docked language model of plain parts was": (
            not isinstance(model, ModelSpec)
        ),
        "parallelism_config_sp_size was not tried; leave it out": sequence_parallel() > 1,
        "quantize was not tried; leave it out": isinstance(model, ModelSpec) and bool(model.quantized),
    }
    for stage in recipe.stages:
        lora, name = stage.lora or LoraSpec(), f"stage {stage.name}: "
        problems |= {
            f"{name}lora: dora and init: pissa read whole weights; leave them out": lora.dora or lora.init == "pissa",
            f"{name}the objective {stage.objective.type} was not tried": stage.objective.type != "next_token",
            f"{name}validate.keep: best was not tried; write keep: last": (
                stage.validate is not None and stage.validate.keep == "best"
            ),
        }
    if found := [words for words, there in problems.items() if there]:
        raise OpticNerveError(
            f"fsdp_state_dict_type: SHARDED_STATE_DICT: {'; '.join(found)}. Or set it to FULL_STATE_DICT, where the "
            "language model fits on each device as a stage begins and ends",
            kind="unsupported",
        )


def _settle_budgets(recipe: Recipe, accelerator: Accelerator) -> tuple[list[Stage], list[str]]:
    """`plan.within_budgets`, for one process."""
    budgets = [s for s in recipe.stages if isinstance(s.gradient_checkpointing, str)]
    if budgets and accelerator.num_processes > 1:
        raise OpticNerveError(
            f"stage {budgets[0].name}: gradient_checkpointing: {budgets[0].gradient_checkpointing} was not tried with "
            f"{accelerator.num_processes} processes; write a number of layers",
            kind="unsupported",
        )
    return within_budgets(recipe)


def _score(dock: Family, recipe: Recipe, name: str) -> float:
    """What the model as it stands scores on an entry of `evaluate`: accuracy, CIDEr, or the mean recall@1."""
    spec = next(s for s in recipe.evaluate if s.name == name).model_copy(update={"image_dependence": 0})
    [found] = evaluate_model(dock.model, dock.processor, [spec])["tasks"]
    if "image_to_text" in found:
        return float(sum(found[way]["R@1"]["accuracy"] for way in ("image_to_text", "text_to_image"))) / 2
    return float(found["cider"] if "cider" in found else found["accuracy"])


def machine() -> dict[str, Any]:
    """Where this ran: what a figure is worth depends on it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": default_device(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _measure_text(dock: Family, results: Results, after: str, console: Console | None, tokens: int | None) -> None:
    """One look at what the language model still knows, unless an earlier call has taken it."""
    entries = results.data.setdefault("forgetting", [])
    if any(e["after"] == after for e in entries):
        return
    begun, answerer, tokenizer = time.perf_counter(), Answerer(dock.model, dock.processor), dock.processor.tokenizer

    def generate(asked: list[Conversation]) -> list[str]:
        return answerer.answer(asked, max_new_tokens=24, batch_size=24)

    untouched = next((e for e in entries if e["after"] == "untouched"), None)
    with Waiting(console, f"text alone, {'before training' if after == 'untouched' else f'after {after}'}"):
        entry = forgetting_entry(
            after,
            cast(nn.Module, dock.model),
            tokenizer,
            generate,
            untouched=untouched,
            reuse_identical=True,
            tokens=tokens,
        )
    entries.append(entry)
    if (dock.lora or {}).get("when") == "media":
        # What the adapter would do to text if it did not step aside: the language model called by itself masks nothing.
        with Waiting(console, f"text alone, adapter forced on, after {after}"):
            forced = perplexity(dock.model.language_model, tokenizer, tokens=tokens)
        entry["perplexity_adapter_on"] = forced["perplexity"]
    seconds = results.data["seconds"]
    seconds["forgetting"] = seconds.get("forgetting", 0.0) + time.perf_counter() - begun
    results.write()
