"""What is worth knowing about a plan before training: contradictions, unusual numbers, things that will not fit."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from opticnerve.common.units import format_bytes
from opticnerve.data.dataset.dataset import NO_MEDIA
from opticnerve.plan.model import native_size
from opticnerve.recipe import FROM, ContinuedSpec, DataSpec, ModelSpec, Recipe, Stage

if TYPE_CHECKING:
    from opticnerve.models.family import FamilyModel
    from opticnerve.plan.cost import Memory

_HIGH = {"language": 1e-4, "language.last": 1e-4, "language.embeddings": 1e-3, "encoder": 1e-4, "encoder.last": 2e-4}


@dataclass(frozen=True)
class Remark:
    """Something worth knowing before training: a `warning` wants a decision, a `note` does not."""

    level: Literal["warning", "note"]
    text: str


def remarks(recipe: Recipe, plan: Any, model: FamilyModel) -> list[Remark]:
    """All that is remarkable about a `Plan`; `model` is what `meta_model` made."""
    found: list[Remark] = []

    def warn(text: str) -> None:
        found.append(Remark("warning", text))

    def note(text: str) -> None:
        found.append(Remark("note", text))

    visual, context = plan.visual_tokens, plan.context
    if visual and context and visual >= context:
        warn(f"one picture takes {visual:,} tokens, the language model {context:,}; use fewer visual tokens")
    elif visual and context and visual > context // 2:
        warn(f"one picture takes {visual:,} of the {context:,} tokens that the language model can read")
    for stage, planned in zip(recipe.stages, plan.stages, strict=True):
        if isinstance(stage.gradient_checkpointing, str) and not planned.problem:
            note(f"stage {stage.name}: {planned.budget_kept(plan.layers)}")
        for text in _stage_warnings(stage, planned, plan):
            warn(f"stage {stage.name}: {text}")
        if not planned.flops:
            kept = f"activations, which {stage.objective.type} keeps for gradients, are not counted"
            note(f"stage {stage.name}: {kept}: {planned.untraced}")
        if planned.cache is not None:
            decide, text = planned.cache.remark()
            (warn if decide else note)(f"stage {stage.name}: {text}")
    encoder = model.image.encoder if "image" in model.towers else None
    if encoder is not None and (native := native_size(encoder)) and native != encoder.image_size:
        note(f"the encoder sees {encoder.image_size} px and was pretrained with {native} px")
    before = _trained_before(recipe)
    for part, name in before.items():
        note(f"the {part} goes on from {name}")
    trains = {model.full_name(part) for stage in recipe.stages for part in stage.train}
    for modality, tower in model.towers.items() if recipe.stages else ():
        for half, module in (("connector", tower.connector), ("fusion", tower.fusion)):
            part = f"{modality}.{half}"
            if part not in trains and not {"model", part} & before.keys() and any(True for _ in module.parameters()):
                noise = "pictures" if modality == "image" else "sounds"
                warn(f"no stage trains {part}, which starts with random weights: the {noise} would be noise")
    if not recipe.stages:
        note("the recipe has no stages: there is nothing to train")
    elif not recipe.evaluate:
        warn("no `evaluate:` section: you will not know whether it works; name questions with known answers")
    for stage in (s for s in recipe.stages if s.data[0].streaming):
        note(f"stage {stage.name} is streamed: only the first rows were looked at, and how many there are is not known")
    for task in recipe.evaluate:
        if any(_overlap(task.data, d) for stage in recipe.stages for d in stage.data):
            warn(f"evaluate {task.name!r} asks about {task.data.path}, which a stage trains on; hold some data out")
    return found


def _trained_before(recipe: Recipe) -> dict[str, str]:
    """`model` or `image.connector`, …: what it goes on from."""
    if isinstance(recipe.model, ContinuedSpec):
        return {"model": recipe.model.source}
    if not isinstance(recipe.model, ModelSpec):
        return {}
    connectors = {f"{m}.connector": t.connector.options.get(FROM) for m, t in recipe.docked.towers.items()}
    return {part: name for part, name in connectors.items() if name is not None}


def _overlap(asked: DataSpec, learned: DataSpec) -> bool:
    """Whether two entries may hold the same samples, by their paths and splits."""
    return asked.path == learned.path and {asked.split, learned.split} != {"train", "held_out"}


def _layers_that_fit(memory: Memory, free: int, layers: int) -> str:
    """The value of `gradient_checkpointing` with which a step fits, as few layers as will do; true if none does."""
    gained = memory.activations - memory.activations_checkpointed
    missing = memory.total - free
    if not 0 < missing < gained:
        return "true"
    return f"{math.ceil(layers * missing / gained)} (of {layers} layers)"


def _stage_warnings(stage: Stage, planned: Any, plan: Any) -> Iterator[str]:
    data = planned.data
    for part, rate in stage.train.items():
        inner = part.removeprefix("image.").partition("(")[0]
        if (usual := _HIGH.get(inner)) and rate > usual:
            yield f"learning rate {rate:g} for {part} is unusually high; such weights rarely bear more than {usual:g}"
    if planned.problem:
        yield planned.problem.removeprefix(f"stage {stage.name}: ")
    if data.problem:
        yield f"its data cannot be read: {data.problem}"
    if data.blind:
        yield NO_MEDIA
    if data.bad:
        refuses = "training will refuse them" if stage.bad_samples == "refuse" else "training will skip them"
        yield f"{data.bad:,} bad samples, {refuses}; `opticnerve data check` lists them; the first: {data.first_bad}"
    if plan.context and data.longest > plan.context:
        yield f"a sample has {data.longest:,} tokens, the language model takes {plan.context:,}; shorten or split it"
    if data.examples and data.examples < stage.batch_size:
        yield f"a batch of {stage.batch_size} is larger than the data ({data.examples} rows), which repeats within it"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if stage.batch_size % (stage.accumulate * world):
        yield (
            f"batch_size {stage.batch_size} does not split over {stage.accumulate} micro-batches and {world} processes"
        )
    if planned.memory.total > (free := plan.device["free"]):
        remedies = []
        if any(part == "language" or part.startswith("language.last") for part in stage.train):
            remedies.append("train language.lora instead of the whole language model")
        if not stage.gradient_checkpointing and plan.visual_tokens is not None:
            remedies.append(f"set gradient_checkpointing: {_layers_that_fit(planned.memory, free, plan.layers)}")
        if stage.batch_size > stage.accumulate:
            remedies.append(f"set accumulate: {stage.batch_size}")
        remedy = ", or ".join(remedies) or "use a smaller model or precision: bf16"
        yield f"needs about {format_bytes(planned.memory.total)}, {format_bytes(free)} are free; {remedy}"
