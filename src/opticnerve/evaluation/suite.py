"""Several tasks on several models, and one table: `opticnerve eval --suite suite.yaml`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from opticnerve.common import atomic
from opticnerve.common.markdown import table
from opticnerve.evaluation.evaluate import evaluate_model
from opticnerve.inference.load import load_any
from opticnerve.recipe import EvaluateSpec
from opticnerve.recipe.model import Strict
from opticnerve.types import OpticNerveError


class Suite(Strict):
    """What to ask, and whom: the entries of a recipe's `evaluate:`, and models beside the one that is named."""

    models: list[str] = Field(default_factory=list)
    evaluate: list[EvaluateSpec] = Field(min_length=1)


def read_suite(path: Path) -> Suite:
    """Raises an OpticNerveError that names the file, the key, and what is wrong."""
    try:
        suite = Suite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise OpticNerveError(f"{path} cannot be read as a suite: {e}") from e
    except ValidationError as e:
        wrong = [f"{'.'.join(map(str, x['loc']))}: {x['msg'].removeprefix('Value error, ')}" for x in e.errors()]
        raise OpticNerveError(f"{path}: {'; '.join(wrong)}") from e
    names = [s.name for s in suite.evaluate]
    if len(set(names)) != len(names):
        raise OpticNerveError(f"{path}: two tasks have the same name; the names are {', '.join(names)}")
    return suite


def run_suite(
    suite: Suite,
    models: list[str],
    out: Path,
    *,
    trust_remote_code: bool = False,
    console: Any = None,
    load: Callable[..., tuple[Any, Any]] = load_any,
) -> dict[str, Any]:
    """Ask all models all tasks; write `out` (JSON) and the table beside it (`.md`) after each.

    A task that fails is noted with its error and the rest goes on: `failed` counts them.

    Args:
        models: names, beside those that the suite lists.
    """
    names = list(dict.fromkeys([*models, *suite.models]))
    if not names:
        raise OpticNerveError("no model: name one on the command line, or list some in the suite under models")
    found: dict[str, Any] = {"models": {}, "failed": 0}
    for name in names:
        mine: dict[str, Any] = {"tasks": []}
        found["models"][name] = mine
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
        all_tasks = [m["tasks"] for m in found["models"].values()]
        done = [tasks[number] if number < len(tasks) else {} for tasks in all_tasks]
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
