"""What a row would have left behind, without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

MACHINE = {
    "cpu": "x86",
    "cores": 2,
    "memory_bytes": 2**34,
    "device": "cpu",
    "python": "3.11",
    "torch": "2",
    "transformers": "5",
}


def pretend(
    spec: dict[str, Any], right: Callable[[str, int, int], float] | None = None, questions: int = 40
) -> dict[str, Any]:
    """The files and facts of a trained row; `right(system, seed, question)` says what it got right."""
    folder = Path(spec["folder"])
    recipe = spec["recipe"]
    seed = 0 if recipe is None else recipe["seed"]
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    forgetting, names = [], [] if recipe is None else recipe["stages"]
    for i, stage in enumerate(names):
        at = folder / "stages" / f"{i}-{stage['name']}"
        at.mkdir(parents=True, exist_ok=True)
        lines = [{"step": s, "loss": 4 / (1 + s) + 0.1 * seed, "tokens": 50} for s in range(1, 9)]
        (at / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (at / "weights.safetensors").write_text("")
    for after, ratio in (("untouched", 1.0), ("instruct", 1.1)):
        forgetting.append({"after": after, "perplexity": 30 * ratio, "answers_hold": 8, "answers": [{}] * 12,
                           "logits_identical": False})  # fmt: skip
    accuracy = {}
    for system in spec["systems"]:
        scores = [(right or (lambda *_: 1.0))(system, seed, q) for q in range(questions)]
        lines = [
            {"id": str(q), "type": ["yes/no", "shape"][q % 2], "question": f"question {q}?", "answer": "yes",
             "prediction": "yes", "right": s}
            for q, s in enumerate(scores)
        ]  # fmt: skip
        (folder / "answers" / f"{system}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        accuracy[system] = sum(scores) / len(scores)
    facts = {
        "machine": MACHINE, "accuracy": accuracy, "train_seconds": 10.0 + len(names), "steps": 8 * len(names),
        "tokens": 400 * len(names), "samples": {"instruct": 64}, "visual_tokens": 16, "fusion": "splice",
        "between_parameters": 1000 + len(spec["folder"]), "trained": 5000, "optimizer_bytes": 60_000,
        "peak_training_bytes": 2**31, "peak_memory_bytes": 2**31, "forgetting": forgetting,
    }  # fmt: skip
    return {"systems": {s: f"answers/{s}.jsonl" for s in spec["systems"]}, "facts": facts}
