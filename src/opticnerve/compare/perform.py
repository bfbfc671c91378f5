"""What one row does: train its recipe, ask it in every way it is asked, and note what it cost.

`python -m opticnerve.compare.perform SPEC.json` does so in a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opticnerve import recipe as recipes
from opticnerve.common import atomic
from opticnerve.compare.base import TASK
from opticnerve.data.dataset.load import fixed_sample, load_data
from opticnerve.evaluation.tasks import Generate, run_vqa
from opticnerve.inference.embeddings import Embedder, load_dual_encoder
from opticnerve.inference.load import load_model
from opticnerve.inference.predictors import LateFusion, VLMPredictor, load_classifier
from opticnerve.inference.zero_shot import ZeroShotPredictor
from opticnerve.recipe import EvaluateSpec
from opticnerve.runs.pipeline import machine, run_recipe
from opticnerve.train.divergence import Diverged
from opticnerve.types import Conversation, OpticNerveError


def perform(spec: dict[str, Any]) -> dict[str, Any]:
    """Train (or go on training) and ask.

    Args:
        spec: `recipe` (a mapping, or None), `folder`, `asks`, `systems`, `needs` (folders of other rows).

    Returns:
        `systems`: name → file of answers, from the folder; `facts`; `diverged`, with the message, if training did: that
        is a finding, and no failure of the row.
    """
    folder = Path(spec["folder"])
    needs = [Path(n) for n in spec["needs"]]
    systems: dict[str, str] = {}
    facts: dict[str, Any] = {"machine": machine(), "accuracy": {}}
    try:
        if spec["recipe"] is not None:
            recipe = recipes.load(spec["recipe"])
            results = run_recipe(recipe, folder, resume=(folder / "recipe.yaml").is_file())
            facts |= _facts(folder, results)
            if recipe.evaluate and recipe.evaluate[0].name == TASK:
                [name] = spec["systems"]
                systems[name] = f"answers/{TASK}.jsonl"
                facts["accuracy"][name] = results["tasks"][0]["accuracy"]
    except Diverged as e:
        return {"systems": {}, "facts": facts, "diverged": str(e)}
    for ask in spec["asks"]:
        spec_of_test = EvaluateSpec(**ask["questions"])
        asked = fixed_sample(load_data(spec_of_test.data), spec_of_test.sample)
        for name, generate in ASKS[ask["ask"]](ask, folder, needs).items():
            found = run_vqa(generate, asked, name=name, keep=0, run_dir=folder)
            systems[name], facts["accuracy"][name] = f"answers/{name}.jsonl", found["accuracy"]
    return {"systems": systems, "facts": facts}


# -- ways to ask that a recipe's own `evaluate` does not know: each gives systems, and how they answer ----------------


def late(ask: dict[str, Any], folder: Path, needs: Sequence[Path]) -> dict[str, Generate]:
    """A late-fusion classifier by each rule of `ask["rules"]` (rule → system): one training, asked several times."""
    predictor = load_classifier(folder)

    def by(rule: str) -> Generate:
        def generate(asked: list[Conversation]) -> list[str]:
            predictor.model.combine = rule
            return predictor.answers(asked)

        return generate

    return {system: by(rule) for rule, system in ask["rules"].items()}


def zero_shot(ask: dict[str, Any], folder: Path, needs: Sequence[Path]) -> dict[str, Generate]:
    """A dual encoder: the answer that lies nearest to the picture; the question is not read."""
    return _choosing(ask, ZeroShotPredictor(Embedder(*load_dual_encoder(str(folder)))))


def ensemble(ask: dict[str, Any], folder: Path, needs: Sequence[Path]) -> dict[str, Generate]:
    """Late fusion of a classifier and a vision-language model that other rows trained."""
    classifier, vlm = needs
    return _choosing(ask, LateFusion([load_classifier(classifier), VLMPredictor(*load_model(vlm))], combine="mean"))


ASKS: dict[str, Callable[[dict[str, Any], Path, Sequence[Path]], dict[str, Generate]]] = {
    "late": late, "zero_shot": zero_shot, "ensemble": ensemble,
}  # fmt: skip


def _choosing(ask: dict[str, Any], predictor: Any) -> dict[str, Generate]:
    choices: list[str] = ask["choices"]

    def generate(asked: list[Conversation]) -> list[str]:
        scores = [predictor.scores(c, choices) for c in asked]
        return [choices[row.index(max(row))] for row in scores]

    return {ask["system"]: generate}


# -- what it cost -----------------------------------------------------------------------------------------------------


def _facts(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    stages = results["stages"]
    tables = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("stages/*/freeze.json"))]
    about = results["model"]
    return {
        "train_seconds": sum(s["seconds"] for s in stages),
        "seconds": results["seconds"]["total"],
        "steps": sum(s["steps"] for s in stages),
        "tokens": sum(s["tokens"] for s in stages),
        "samples": {s["name"]: s["samples"] for s in stages},
        "final_loss": stages[-1]["final_loss"],
        "validation": stages[-1].get("validation"),
        "visual_tokens": about.get("visual_tokens"),
        "fusion": about.get("fusion"),
        "between_parameters": between(tables[-1]),
        "trained": max(t["trained"] for t in tables),
        "optimizer_bytes": max(optimizer_bytes(t) for t in tables),
        "peak_memory_bytes": results["peak_memory_bytes"],
        "forgetting": [{k: v for k, v in e.items() if k != "probe"} for e in results.get("forgetting", [])],
    }


def between(table: dict[str, Any]) -> int:
    """Parameters of the connector and of the fusion, from a freeze table."""
    return sum(r["parameters"] for r in table["rows"] if r["part"].startswith(("image.connector", "image.fusion")))


def optimizer_bytes(table: dict[str, Any]) -> int:
    """What AdamW keeps of what trains: two float32 moments each, and a float32 master where the weight is none."""
    return sum(r["parameters"] * (8 if r["dtype"] == "float32" else 12) for r in table["rows"] if r["trained"])


# -- a process of its own ---------------------------------------------------------------------------------------------


def main(path: str) -> int:
    """Perform the row and write its outcome; 130 if it was stopped (and saved), 1 if it failed."""
    spec: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    threading.Thread(target=_stop_with, args=(spec["parent"],), daemon=True).start()
    code = 0
    try:
        found = perform(spec)
    except KeyboardInterrupt:
        return 130
    except Exception as e:  # it is told to the parent, which goes on with other rows
        traceback.print_exc()
        found = {"error": str(e) if isinstance(e, OpticNerveError) else f"{type(e).__name__}: {e}"}
        code = 1
    atomic.write_json(Path(spec["outcome"]), found, default=str)
    return code


def _stop_with(parent: int) -> None:
    """Stop, and save, when the process that waits for this one is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
