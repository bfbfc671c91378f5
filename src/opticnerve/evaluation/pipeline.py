"""A whole run: dock, measure, train each stage, measure again, write the card. Each piece done is kept at once."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import opticnerve
from opticnerve import recipe as recipes
from opticnerve.build import Dock, dock_recipe
from opticnerve.data.source import by_picture, fixed_sample, load_data
from opticnerve.evaluation import tasks
from opticnerve.evaluation.card import write_card
from opticnerve.evaluation.choice import run_choice
from opticnerve.evaluation.forgetting import forgetting_entry, perplexity
from opticnerve.evaluation.image_dependence import balanced, image_dependence
from opticnerve.evaluation.waiting import Waiting
from opticnerve.inference.generate import Answerer
from opticnerve.language.lora import has_lora
from opticnerve.models import delta
from opticnerve.recipe import EvaluateSpec, Recipe
from opticnerve.starter import weights as starter
from opticnerve.train.loop import run_stage
from opticnerve.train.prepare import make_accelerator
from opticnerve.types import Conversation, OpticNerveError


def run_recipe(
    recipe: Recipe, run_dir: Path, *, resume: bool = False, command: str = "", console: Any = None
) -> dict[str, Any]:
    """Train every stage of a recipe, evaluate, and fill the run folder; returns what `results.json` holds.

    Args:
        resume: go on where an earlier call with the same recipe stopped: finished stages are loaded, a begun one
            continues from its newest checkpoint.
        command: what the user typed, for the card.
        console: a rich console for progress, or None for silence.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, after saving. OpticNerveError: anything a user can put right.
    """
    started = time.perf_counter()
    if not recipe.stages:
        raise OpticNerveError("the recipe has no stages; add at least one under `stages:`")
    run_dir.mkdir(parents=True, exist_ok=True)
    _keep_recipe(recipe, run_dir, resume)
    results = _Results(run_dir / "results.json", fresh=not resume)
    for spec in recipe.evaluate:
        load_data(spec.data)  # a bad question is found now, not when all is trained
    dock = dock_recipe(recipe)
    if console is not None:
        console.print(_headline(dock))
    results.set("model", _describe(dock))
    results.set("machine", machine())
    results.data |= {"command": command, "opticnerve": opticnerve.__version__, "seed": recipe.seed}
    accelerator = make_accelerator(recipe, run_dir)
    main = accelerator.is_main_process
    trained: set[str] = set()
    seconds = results.data.setdefault("seconds", {})
    dock.model.to(accelerator.device)
    if recipe.forgetting and main:
        _measure_text(dock, results, "untouched", console, seconds)
    for number, stage in enumerate(recipe.stages):
        folder = run_dir / "stages" / f"{number}-{stage.name}"
        finished = folder / "result.json"
        if resume and finished.is_file():
            _load_stage(dock, folder, trained)
        else:
            outcome = run_stage(
                dock, recipe, stage, folder, trained_before=trained, resume=resume, console=console,
                accelerator=accelerator,
            )  # fmt: skip
            if main:
                finished.write_text(json.dumps(outcome.to_dict()) + "\n")
        if main:
            done = json.loads(finished.read_text())
            seconds[stage.name] = done["seconds"]
            results.set("stages", [s for s in results.data.get("stages", []) if s["name"] != stage.name] + [done])
            if recipe.forgetting:
                _measure_text(dock, results, stage.name, console, seconds)
            write_card(run_dir)
    if not main:
        return results.data
    _publish(run_dir, folder)
    dock.model.eval()
    begun = time.perf_counter()
    found = evaluate_model(dock.model, dock.processor, recipe.evaluate, console=console, run_dir=run_dir)
    seconds["evaluate"] = time.perf_counter() - begun
    seconds["total"] = seconds.get("total", 0.0) + time.perf_counter() - started
    results.data |= found | {"seconds": seconds, "peak_memory_bytes": peak_memory()}
    results.write()
    write_card(run_dir)
    if recipe.trackers:
        accelerator.end_training()
    return results.data


def evaluate_model(
    model: Any, processor: Any, specs: Sequence[EvaluateSpec], *, console: Any = None, run_dir: Path | None = None
) -> dict[str, Any]:
    """The `tasks` and `image_dependence` entries of results.json, from the recipe's `evaluate` list."""
    found: dict[str, Any] = {"tasks": []}
    answerer = Answerer(model, processor)
    for spec in specs:
        everything = load_data(spec.data)
        conversations = fixed_sample(everything, spec.sample)
        if spec.metric == "choice":
            with Waiting(console, f"{spec.name}: true caption against nine others") as bar:
                found["tasks"].append(run_choice(model, processor, conversations, name=spec.name, progress=bar.update))
            continue

        def generate(asked: list[Conversation], spec: EvaluateSpec = spec) -> list[str]:
            return answerer.answer(asked, max_new_tokens=spec.max_new_tokens, batch_size=spec.batch_size)

        if spec.metric == "captions":
            conversations = [
                replace(group[0], meta={"captions": [c.answer for c in group]}) for group in by_picture(conversations)
            ]
        score = tasks.run_captions if spec.metric == "captions" else tasks.run_vqa
        with Waiting(console, spec.name) as bar:
            found["tasks"].append(score(generate, conversations, name=spec.name, progress=bar.update, run_dir=run_dir))
        if spec.metric == "vqa":
            found["tasks"][-1]["most_frequent_answer"] = tasks.most_frequent_answer(conversations)
        if spec.image_dependence and spec.metric == "vqa" and "image_dependence" not in found:
            seen = [c for c in everything if c.prompt().images]
            found["image_dependence"] = _dependence(generate, seen, spec.image_dependence, console)
    return found


def _dependence(
    generate: tasks.Generate, conversations: list[Conversation], count: int, console: Any
) -> dict[str, Any] | None:
    """Image dependence on a balanced sample and on questions as they come; the latter alone if none can be balanced."""
    measured = {}
    for sampling, some in (
        ("balanced", balanced(conversations, count, seed=1)),
        ("as they come", fixed_sample(conversations, count, seed=1)),
    ):
        if len({c.images[0].source for c in some if isinstance(c.images[0].source, Path | bytes)}) > 1:
            with Waiting(console, f"image dependence, questions {sampling}: real, blank, shuffled pictures") as bar:
                measured[sampling] = image_dependence(generate, some, progress=bar.update)
    if not measured:
        return None
    sampling, first = next(iter(measured.items()))
    others = {k: v for k, v in measured.items() if k != sampling}
    return {**first, "sampling": sampling} | ({"other_samples": others} if others else {})


def machine() -> dict[str, Any]:
    """Where this ran: what a figure is worth depends on it."""
    import psutil
    import transformers

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": accelerator.type if accelerator is not None else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def peak_memory() -> int:
    """The most memory this process has held, in bytes (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


class _Results:
    """results.json, written whole after each finding."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self.path = path
        self.data: dict[str, Any] = {}
        if not fresh and path.is_file():
            self.data = json.loads(path.read_text(encoding="utf-8"))

    def set(self, key: str, value: Any) -> None:
        self.data[key] = value
        self.write()

    def write(self) -> None:
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(self.data, indent=1, default=str) + "\n", encoding="utf-8")
        partial.replace(self.path)


def _measure_text(dock: Dock, results: _Results, after: str, console: Any, seconds: dict[str, float]) -> None:
    """One look at what the brain still knows, unless an earlier call has taken it."""
    entries = results.data.setdefault("forgetting", [])
    if any(e["after"] == after for e in entries):
        return
    begun = time.perf_counter()
    answerer = Answerer(dock.model, dock.processor)

    def generate(asked: list[Conversation]) -> list[str]:
        return answerer.answer(asked, max_new_tokens=24, batch_size=24)

    untouched = next((e for e in entries if e["after"] == "untouched"), None)
    with Waiting(console, f"text alone, {'before training' if after == 'untouched' else f'after {after}'}"):
        entries.append(
            forgetting_entry(
                after, dock.model, dock.processor.tokenizer, generate, untouched=untouched, reuse_identical=True
            )
        )
    if (dock.lora or {}).get("when") == "media":
        # What the adapter would do to text if it did not step aside: the language model called by itself knows no gate.
        with Waiting(console, f"text alone, adapter forced on, after {after}"):
            forced = perplexity(dock.model.language_model, dock.processor.tokenizer)
        entries[-1]["perplexity_adapter_on"] = forced["perplexity"]
    seconds["forgetting"] = seconds.get("forgetting", 0.0) + time.perf_counter() - begun
    results.write()


def _load_stage(dock: Dock, folder: Path, trained: set[str]) -> None:
    """Bring the model to where a finished stage left it."""
    reference = delta.read(folder)
    if reference["lora"] and not has_lora(dock.model.language_model):
        dock.lora = reference["lora"]
        dock.model.give_lora(reference["lora"])
    with torch.no_grad():
        delta.put(dock.model, folder, reference["tensors"])
    trained |= {n for n in reference["tensors"] if n in dict(dock.model.named_parameters())}


def _publish(run_dir: Path, last: Path) -> None:
    """The run's own folder is the model of its last stage."""
    for file in last.iterdir():
        if file.is_file() and file.name not in ("freeze.json", "metrics.jsonl", "result.json"):
            shutil.copy2(file, run_dir / file.name)


def _keep_recipe(recipe: Recipe, run_dir: Path, resume: bool) -> None:
    path, text = run_dir / "recipe.yaml", recipes.dump(recipe)
    if resume and path.is_file() and path.read_text(encoding="utf-8") != text:
        raise OpticNerveError(
            f"{path} differs from the recipe given now; resume with the same one, or choose another --out"
        )
    path.write_text(text, encoding="utf-8")


def _describe(dock: Dock) -> dict[str, Any]:
    bases, towers = dock.bases, dock.model.towers
    modality, tower = next(iter(towers.items()))
    parts = dock.model.config.towers[modality]
    return {
        "encoder": encoder_name(bases[modality]["name"], parts["encoder"]["type"]),
        "connector": parts["connector"]["type"],
        "fusion": parts["fusion"]["type"],
        "modalities": list(towers),
        "language": bases["language"]["name"],
        "visual_tokens": tower.num_tokens,
        "encoder_width": tower.encoder.hidden_size,
        "encoder_tokens": tower.encoder.num_tokens,
        "image_size": getattr(tower.encoder, "image_size", None),
        "width": tower.connector.out_size,
        # The starter kit's parts are Apache-2.0 all; of other parts we do not know.
        "license": "apache-2.0" if all(starter.is_starter(str(b["name"])) for b in bases.values()) else "other",
    }


def encoder_name(name: Any, kind: str) -> str:
    """How reports call an encoder: by its weights' name, or names, or by its type where it has none."""
    if isinstance(name, dict):
        return " + ".join(encoder_name(n, kind) for n in name.values())
    return str(name) if name is not None else kind


def _headline(dock: Dock) -> str:
    d = _describe(dock)
    return (
        f"[bold]{d['encoder']}[/bold] ({d['encoder_tokens']} × {d['encoder_width']}) → {d['connector']} → "
        f"{d['visual_tokens']} tokens × {d['width']} → [bold]{d['language']}[/bold]"
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
