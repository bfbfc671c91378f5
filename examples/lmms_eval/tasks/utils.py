"""What the two tasks need beside their YAML: a question's picture, and how an answer is scored."""

from __future__ import annotations

from typing import Any

from PIL import Image

from opticnerve.evaluation.metrics import exact_match


def pictures(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(doc["image"]).convert("RGB")]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`accuracy` as `opticnerve eval` has it: exact match after VQAv2's normalisation."""
    return {"accuracy": float(exact_match(results[0], [doc["answer"]]))}
