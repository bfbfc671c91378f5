"""A model's answers to a recipe's `evaluate` list, and suites: several tasks on several models, and one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field, ValidationError
from rich.console import Console

from opticnerve.common import atomic
from opticnerve.common.markdown import table
from opticnerve.common.progress import Waiting
from opticnerve.data.dataset.load import by_picture, fixed_sample, load_data
from opticnerve.evaluation import tasks
from opticnerve.evaluation.choice import run_choice, run_multiple_choice
from opticnerve.evaluation.image_dependence import balanced, image_dependence
from opticnerve.evaluation.retrieval import run_retrieval, run_zero_shot
from opticnerve.evaluation.scorers import SCORERS
from opticnerve.inference.embeddings import Embedder
from opticnerve.inference.load import load_any
from opticnerve.inference.predictors import answers_of
from opticnerve.recipe import EvaluateSpec
from opticnerve.recipe.model import Strict
from opticnerve.types import Conversation, Frame, MediaProcessor, OpticNerveError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate_model(
    model: PreTrainedModel, processor: MediaProcessor, specs: Sequence[EvaluateSpec], *, console: Console | None = None,
    run_dir: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The `tasks` and `image_dependence` entries of results.json, from the recipe's `evaluate` list."""
    found: dict[str, Any] = {"tasks": []}
    for spec in specs:
        everything = load_data(spec.data)
        generate = partial(answers_of, model, processor, max_new_tokens=spec.max_new_tokens, batch_size=spec.batch_size)
        label = f"{spec.name}: true caption against nine others" if spec.metric == "choice" else spec.name
        conversations = fixed_sample(everything, spec.sample)
        score = _scoring(spec, model, processor, generate, run_dir)
        with Waiting(console, label) as bar:
            found["tasks"].append(score(conversations, name=spec.name, progress=bar.update))
        if (scorer := SCORERS.get(spec.metric)) is not None:
            found["tasks"][-1]["most_frequent_answer"] = tasks.most_frequent_answer(conversations, scorer)
        if spec.image_dependence and spec.metric == "vqa" and "image_dependence" not in found:
            seen = [c for c in everything if c.prompt().images]
            found["image_dependence"] = _dependence(generate, seen, spec.image_dependence, console)
    return found


def _scoring(
    spec: EvaluateSpec, model: Any, processor: Any, generate: tasks.Generate, run_dir: Path | None
) -> Callable[..., dict[str, Any]]:
    """What turns conversations, a `name` and a `progress` into an entry of `tasks`."""
    match spec.metric:
        case "retrieval":
            return partial(run_retrieval, Embedder(model, processor, batch_size=spec.batch_size))
        case "zero_shot":
            embedder = Embedder(model, processor, batch_size=spec.batch_size)
            return partial(run_zero_shot, embedder, classes=spec.classes, templates=spec.templates)
        case "choice":
            return partial(run_choice, model, processor)
        case "multiple_choice":
            return partial(run_multiple_choice, model, processor)
        case "captions":
            return partial(_captions, generate, run_dir=run_dir)
        case metric:
            return partial(tasks.run_vqa, generate, scorer=SCORERS[metric], run_dir=run_dir)


def _captions(generate: tasks.Generate, conversations: Sequence[Conversation], **options: Any) -> dict[str, Any]:
    """All captions of a picture are its references."""
    groups = [replace(g[0], meta={"captions": [c.answer for c in g]}) for g in by_picture(conversations)]
    return tasks.run_captions(generate, groups, **options)


def _dependence(
    generate: tasks.Generate, conversations: list[Conversation], count: int, console: Console | None
) -> dict[str, Any] | None:
    """Image dependence on a balanced sample and on questions as they come; the latter alone if none can be balanced."""
    measured = {}
    for sampling, some in (
        ("balanced", balanced(conversations, count, seed=1)),
        ("as they come", fixed_sample(conversations, count, seed=1)),
    ):
        shown = (c.images[0].source for c in some)
        pictures = {s.source if isinstance(s, Frame) else s for s in shown if isinstance(s, Path | bytes | Frame)}
        if len(pictures) > 1:
            with Waiting(console, f"image dependence, questions {sampling}: real, blank, shuffled pictures") as bar:
                measured[sampling] = image_dependence(generate, some, progress=bar.update)
    if not measured:
        return None
    sampling, first = next(iter(measured.items()))
    others = {k: v for k, v in measured.items() if k != sampling}
    return {**first, "sampling": sampling} | ({"other_samples": others} if others else {})


# -- suites: `opticnerve eval --suite suite.yaml` ---------------------------------------------------------------------


class Suite(Strict):
    """What to ask, and whom: the entries of a recipe's `evaluate:`, and models beside the one that is named."""

    models: list[str] = Field(default_factory=list)
    evaluate: list[EvaluateSpec] = Field(min_length=1)


def read_suite(path: Path) -> Suite:
    """Raises an OpticNerveError that names the file, the key, and what is wrong."""
    try:
        suite = Suite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise OpticNerveError(f"{path} cannot be read as a suite: {e}", kind="damaged") from e
    except ValidationError as e:
        wrong = [f"{'.'.join(map(str, x['loc']))}: {x['msg'].removeprefix('Value error, ')}" for x in e.errors()]
        raise OpticNerveError(f"{path}: {'; '.join(wrong)}", kind="recipe") from e
    names = [s.name for s in suite.evaluate]
    if len(set(names)) != len(names):
        raise OpticNerveError(
            f"{path}: two tasks have the same name; the names are {', '.join(names)}", kind="conflict"
        )
    return suite


def run_suite(
    suite: Suite, models: list[str], out: Path, *, trust_remote_code: bool = False, console: Console | None = None,
    load: Callable[..., tuple[Any, Any]] = load_any,
) -> dict[str, Any]:  # fmt: skip
    """Ask all models all tasks; write `out` (JSON) and the table beside it (`.md`) after each.

    A task that fails is noted with its error and the rest goes on: `failed` counts them.

    Args:
        models: names, beside those that the suite lists.
    """
    names = list(dict.fromkeys([*models, *suite.models]))
    if not names:
        raise OpticNerveError(
            "no model: name one on the command line, or list some in the suite under models", kind="missing-field"
        )
    found: dict[str, Any] = {"models": {}, "failed": 0}
    for name in names:
        mine = found["models"].setdefault(name, {"tasks": []})
        try:
            model, processor = load(name, trust_remote_code=trust_remote_code)
        except (OpticNerveError, OSError) as e:
            mine["error"] = str(e)
            found["failed"] += len(suite.evaluate)
            _write(found, suite, out)
            continue
        for spec in suite.evaluate:
            try:
                done = evaluate_model(model, processor, [spec], console=console)
                mine["tasks"].append(done.pop("tasks")[0] | done)
            except OpticNerveError as e:
                mine["tasks"].append({"name": spec.name, "error": str(e)})
                found["failed"] += 1
            _write(found, suite, out)
    return found


def suite_table(found: dict[str, Any], suite: Suite) -> str:
    """A row a task, a column a model; the harness beside each task's name."""
    rows = []
    for number, spec in enumerate(suite.evaluate):
        done = [dict(enumerate(m["tasks"])).get(number, {}) for m in found["models"].values()]
        harness = next((t["harness"] for t in done if "harness" in t), "")
        rows.append([spec.name, harness, *map(_score, done)])
    return table(["task", "scored by", *found["models"]], rows, right=tuple(range(2, 2 + len(found["models"]))))


def _score(task: dict[str, Any]) -> str:
    if "error" in task:
        return "failed"
    if "image_to_text" in task:
        directions = ("image_to_text", "text_to_image")
        return "R@1 " + ", ".join(f"{task[d]['R@1']['accuracy']:.1%}" for d in directions if "R@1" in task[d])
    if "cider" in task:
        return f"CIDEr {task['cider']:.3f}, BLEU-4 {task['bleu4']:.3f}, ROUGE-L {task['rouge_l']:.3f}"
    if "accuracy" not in task:
        return ""
    low, high = task["ci95"]
    return f"{task['accuracy']:.1%} ({low:.1%} to {high:.1%})" + (f", F1 {task['f1']:.1%}" if task.get("f1") else "")


def _write(found: dict[str, Any], suite: Suite, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(out, found, ensure_ascii=False, default=str)
    entries = [(n, entry) for n, m in found["models"].items() for entry in [*m["tasks"], m]]
    errors = [(n, entry.get("name", ""), entry["error"]) for n, entry in entries if "error" in entry]
    notes = "".join(f"\n- {n}{', ' + task if task else ''} failed: {error}" for n, task, error in errors)
    atomic.write(out.with_suffix(".md"), f"{suite_table(found, suite)}\n{notes}\n")
