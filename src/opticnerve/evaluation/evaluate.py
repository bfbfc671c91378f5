"""A model's answers to a recipe's `evaluate` list: the entries of results.json under `tasks` and `image_dependence`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from opticnerve.common.progress import Waiting
from opticnerve.data.dataset.load import by_picture, fixed_sample, load_data
from opticnerve.evaluation import tasks
from opticnerve.evaluation.choice import run_choice, run_multiple_choice
from opticnerve.evaluation.image_dependence import balanced, image_dependence
from opticnerve.evaluation.judges import SCORERS
from opticnerve.evaluation.retrieval import run_retrieval, run_zero_shot
from opticnerve.inference.embeddings import Embedder
from opticnerve.inference.predictors import answers_of
from opticnerve.recipe import EvaluateSpec
from opticnerve.types import Conversation


def evaluate_model(
    model: Any, processor: Any, specs: Sequence[EvaluateSpec], *, console: Any = None, run_dir: Path | None = None
) -> dict[str, Any]:
    """The `tasks` and `image_dependence` entries of results.json, from the recipe's `evaluate` list."""
    found: dict[str, Any] = {"tasks": []}
    for spec in specs:
        everything = load_data(spec.data)
        conversations = fixed_sample(everything, spec.sample)
        if spec.metric in ("retrieval", "zero_shot"):
            found["tasks"].append(_of_embeddings(model, processor, spec, conversations, console))
            continue
        if spec.metric == "choice":
            with Waiting(console, f"{spec.name}: true caption against nine others") as bar:
                found["tasks"].append(run_choice(model, processor, conversations, name=spec.name, progress=bar.update))
            continue
        if spec.metric == "multiple_choice":
            with Waiting(console, spec.name) as bar:
                found["tasks"].append(
                    run_multiple_choice(model, processor, conversations, name=spec.name, progress=bar.update)
                )
            continue

        def generate(asked: list[Conversation], spec: EvaluateSpec = spec) -> list[str]:
            return answers_of(model, processor, asked, max_new_tokens=spec.max_new_tokens, batch_size=spec.batch_size)

        if spec.metric == "captions":
            conversations = [
                replace(group[0], meta={"captions": [c.answer for c in group]}) for group in by_picture(conversations)
            ]
        scorer = SCORERS.get(spec.metric)
        score = tasks.run_captions if scorer is None else partial(tasks.run_vqa, scorer=scorer)
        with Waiting(console, spec.name) as bar:
            found["tasks"].append(score(generate, conversations, name=spec.name, progress=bar.update, run_dir=run_dir))
        if scorer is not None:
            found["tasks"][-1]["most_frequent_answer"] = tasks.most_frequent_answer(conversations, scorer)
        if spec.image_dependence and spec.metric == "vqa" and "image_dependence" not in found:
            seen = [c for c in everything if c.prompt().images]
            found["image_dependence"] = _dependence(generate, seen, spec.image_dependence, console)
    return found


def _of_embeddings(
    model: Any, processor: Any, spec: EvaluateSpec, conversations: list[Conversation], console: Any
) -> dict[str, Any]:
    embedder = Embedder(model, processor, batch_size=spec.batch_size)
    with Waiting(console, spec.name) as bar:
        if spec.metric == "retrieval":
            return run_retrieval(embedder, conversations, name=spec.name, progress=bar.update)
        return run_zero_shot(
            embedder, conversations, name=spec.name, classes=spec.classes, templates=spec.templates,
            progress=bar.update,
        )  # fmt: skip


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
