"""What one row does: train its recipe, ask it in every way it is asked, and note what it cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opticnerve import recipe as recipes
from opticnerve.compare.asking import ASKS
from opticnerve.compare.base import TASK
from opticnerve.runs.pipeline import machine, run_recipe
from opticnerve.train.loop import Diverged


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
            if recipe.evaluate:
                [name] = spec["systems"]
                systems[name] = f"answers/{TASK}.jsonl"
                facts["accuracy"][name] = results["tasks"][0]["accuracy"]
    except Diverged as e:
        return {"systems": {}, "facts": facts, "diverged": str(e)}
    for ask in spec["asks"]:
        for name, found in ASKS[ask["ask"]](ask, folder, needs).items():
            systems[name] = f"answers/{name}.jsonl"
            facts["accuracy"][name] = found["accuracy"]
    return {"systems": systems, "facts": facts}


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
