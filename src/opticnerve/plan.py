"""What a recipe will do and cost, before it runs: no weight is read or downloaded, unless to calibrate."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from opticnerve import plan_cost as cost
from opticnerve import plan_model as parts
from opticnerve import registry
from opticnerve.build_parts import dtype_of
from opticnerve.data.collate import Collator
from opticnerve.data.labels import Encoded
from opticnerve.language.lora import add_lora
from opticnerve.models.delta import weight_names
from opticnerve.objectives.next_token import NextToken
from opticnerve.plan_data import StageData, look
from opticnerve.plan_model import Shape, Share, context_of, processor_for
from opticnerve.recipe import DataSpec, LoraSpec, Recipe, Stage
from opticnerve.starter import weights as starter
from opticnerve.types import OpticNerveError

__all__ = ["Plan", "Remark", "StagePlan", "context_length", "make", "processor_for", "weights_at_hand"]

_CALIBRATION_TOKENS = 768  # a batch of about so many tokens is timed
_HIGH = {"language": 1e-4, "language.last": 1e-4, "language.embeddings": 1e-3, "encoder": 1e-4, "encoder.last": 2e-4}


@dataclass(frozen=True)
class Remark:
    """Something worth knowing before training: a `warning` wants a decision, a `note` does not."""

    level: Literal["warning", "note"]
    text: str


@dataclass
class StagePlan:
    """One stage: what trains, on how much, at what cost. What could not be found out is None."""

    name: str
    shares: list[Share]
    data: StageData
    batch_size: int
    memory: cost.Memory
    flops: int
    seconds: float | None = None
    timing: str = ""

    @property
    def trained(self) -> int:
        return sum(s.parameters for s in self.shares if s.trained)

    @property
    def total(self) -> int:
        return sum(s.parameters for s in self.shares)

    @property
    def epochs(self) -> float | None:
        if not self.data.units or self.data.steps is None:
            return None
        return self.data.steps * self.batch_size / self.data.units

    def to_dict(self) -> dict[str, Any]:
        data = self.data
        return {
            "name": self.name,
            "parts": [asdict(s) for s in self.shares],
            "trained": self.trained,
            "total": self.total,
            "samples": data.samples,
            "bad_samples": data.bad,
            "steps": data.steps,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "tokens_per_row": data.length or None,
            "longest_sample": data.longest or None,
            "memory_bytes": self.memory.to_dict(),
            "flops_per_step": self.flops,
            "seconds": self.seconds,
            "timing": self.timing,
        }


@dataclass
class Plan:
    """What `make` found. `sample` is the first sample of the first stage, rendered and masked."""

    name: str
    precision: str
    shapes: list[Shape]
    visual_tokens: int | None
    context: int | None
    device: dict[str, Any]
    stages: list[StagePlan] = field(default_factory=list)
    sample: Encoded | None = None
    processor: Any = None
    remarks: list[Remark] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "name": self.name,
            "precision": self.precision,
            "shapes": [asdict(s) for s in self.shapes],
            "visual_tokens": self.visual_tokens,
            "context": self.context,
            "device": self.device,
            "stages": [s.to_dict() for s in self.stages],
            "remarks": [asdict(r) for r in self.remarks],
        }


def make(recipe: Recipe, *, dock: Callable[[Recipe], Any] | None = None) -> Plan:
    """Foresee a run.

    Args:
        dock: `opticnerve.build.dock_recipe`, to calibrate with: the weights are then loaded and one short batch of each
            stage is timed. Without it, time is estimated from a measured matmul rate and counted arithmetic.

    Raises:
        OpticNerveError: the recipe's parts do not exist or do not fit each other; unreadable data is a remark.
    """
    process = cost.process_bytes()
    model = parts.shadow(recipe)
    machine = cost.device()
    visual = max((_most_placeholders(t) for t in model.towers.values()), default=None)
    plan = Plan(
        recipe.name,
        recipe.precision,
        parts.shapes(recipe, model),
        visual,
        context_of(model.language_model.config),
        machine,
    )
    try:
        plan.processor = processor_for(recipe)
    except OpticNerveError as e:
        plan.remarks.append(Remark("note", f"no sample is shown, and lengths are guessed: {e}"))
    docked = dock(recipe) if dock is not None and recipe.stages else None
    rate = 0.0 if docked or not recipe.stages else cost.matmul_rate(machine["type"], dtype_of(recipe))
    for stage in recipe.stages:
        data = look(stage, plan.processor, seed=recipe.seed)
        plan.stages.append(_stage(stage, model, data, process, visual or 0))
        _time(plan.stages[-1], stage, docked, plan.processor, rate, machine["type"])
        plan.sample = plan.sample or data.sample
    plan.remarks += _remarks(recipe, plan, model)
    return plan


def context_length(recipe: Recipe) -> int | None:
    """How many tokens the recipe's language model takes."""
    return context_of(parts.language_config(recipe.docked.language))


def weights_at_hand(recipe: Recipe) -> bool:
    """Whether a calibration would download nothing: every weight comes from the starter kit or a local folder."""
    names = [recipe.docked.language.name]
    for tower in recipe.docked.towers.values():
        names += weight_names(registry.encoders.get(tower.encoder.type).take_name(tower.encoder.options)[0])
    return all(starter.is_starter(n) or Path(n.removeprefix("local-dir:")).exists() for n in names)


def _stage(stage: Stage, model: Any, data: StageData, process: int, visual: int) -> StagePlan:
    """Parts, memory and arithmetic of one stage. LoRA that a stage adds stays in the model for the stages after it."""
    _adapt(model, stage, torch.device("meta"))
    shares = parts.open_parts(model, stage.train)
    rows = stage.batch_size // stage.accumulate
    length = data.length or visual + 64
    # Batches are padded to their longest row.
    longest = max((len(r) for r in data.rows), default=length)
    padded = min(longest, math.ceil(1.25 * length)) if data.rows else length
    media = {m: math.ceil(rows * data.media(m) * _pieces(t)) for m, t in model.towers.items()}
    supervised = math.ceil(rows * (data.supervised or 32))
    trace = cost.Trace(0, 0, 0)
    if stage.objective.type == "next_token":
        trace = cost.trace_step(model, rows=rows, length=padded, media=media, supervised=supervised)
    needed = cost.memory(model, trace, checkpointing=stage.gradient_checkpointing, process=process)
    again = 4 / 3 if stage.gradient_checkpointing else 1.0  # the forward pass of the layers is done twice
    return StagePlan(stage.name, shares, data, stage.batch_size, needed, round(trace.flops * stage.accumulate * again))


def _most_placeholders(tower: Any) -> int:
    """Tokens that one picture (or window of sound) takes in the text, at most."""
    tiled = tower.tiling is not None and tower.num_placeholders > 1
    return int(tower.tiling.spec.max_tokens if tiled else tower.num_placeholders)


def _pieces(tower: Any) -> int:
    """Tiles of a picture in the middle of what the tiling allows; 1 where there are no tiles."""
    if tower.tiling is None:
        return 1
    spec = tower.tiling.spec
    tiles = sorted(spec.num_tiles(*point) for point in spec.pinpoints)
    return int(tiles[len(tiles) // 2])


def _adapt(model: Any, stage: Stage, where: Any) -> None:
    if "language.lora" in stage.train and not cost.has_lora_weights(model.language_model):
        with where:
            add_lora(model.language_model, (stage.lora or LoraSpec()).model_dump())


def _time(planned: StagePlan, stage: Stage, docked: Any, processor: Any, rate: float, kind: str) -> None:
    """Seconds of a stage: one real step on a short batch, or arithmetic over the machine's matmul rate."""
    steps = planned.data.steps
    if not planned.flops:
        planned.timing = f"not estimated for objective {stage.objective.type}"
        return
    if docked is not None and planned.data.rows:
        per_row = _measure(stage, docked, processor, planned.data, kind)
        planned.timing = "a short batch was timed with the real weights"
        planned.seconds = per_row * stage.batch_size * steps if steps else None
        return
    rate = rate or cost.matmul_rate(kind, next(docked.model.parameters()).dtype if docked else torch.float32)
    planned.timing = (
        f"estimated from {planned.flops / 1e9:,.0f} GFLOP a step at {cost.EFFICIENCY:.0%} of this device's "
        f"matmul rate ({rate / 1e9:,.0f} GFLOP/s)"
    )
    planned.seconds = planned.flops * steps / (rate * cost.EFFICIENCY) if steps else None


def _measure(stage: Stage, docked: Any, processor: Any, data: StageData, kind: str) -> float:
    """Seconds of one training row, forward and backward."""
    model = docked.model.to(kind)
    _adapt(model, stage, torch.device(kind))
    parts.open_parts(model, stage.train)
    count = max(
        1, min(stage.batch_size // stage.accumulate, len(data.rows), _CALIBRATION_TOKENS // max(1, data.length))
    )
    batch = Collator(processor)(data.rows[:count]).to(kind)
    objective = NextToken(model)

    def step() -> None:
        loss, _ = objective(batch)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return cost.time_step(step, kind) / count


def _remarks(recipe: Recipe, plan: Plan, model: Any) -> list[Remark]:
    found: list[Remark] = []

    def warn(text: str) -> None:
        found.append(Remark("warning", text))

    def note(text: str) -> None:
        found.append(Remark("note", text))

    context = plan.context
    if plan.visual_tokens and context and plan.visual_tokens >= context:
        warn(
            f"one picture takes {plan.visual_tokens:,} tokens, the language model {context:,}; use fewer visual tokens"
        )
    elif plan.visual_tokens and context and plan.visual_tokens > context // 2:
        warn(f"one picture takes {plan.visual_tokens:,} of the {context:,} tokens that the language model can read")
    for stage, planned in zip(recipe.stages, plan.stages, strict=True):
        for text in _stage_warnings(stage, planned, plan):
            warn(f"stage {stage.name}: {text}")
    eye = model.image.encoder if "image" in model.towers else None
    if eye is not None and (native := parts.native_size(eye)) and native != eye.image_size:
        note(f"the encoder sees {eye.image_size} px and was pretrained with {native} px")
    trains = {parts.full_name(model, part) for stage in recipe.stages for part in stage.train}
    for modality, tower in model.towers.items() if recipe.stages else ():
        for half, module in (("connector", tower.connector), ("fusion", tower.fusion)):
            if f"{modality}.{half}" not in trains and any(True for _ in module.parameters()):
                noise = "pictures" if modality == "image" else "sounds"
                warn(f"no stage trains {modality}.{half}, which starts with random weights: the {noise} would be noise")
    if not recipe.stages:
        note("the recipe has no stages: there is nothing to train")
    elif not recipe.evaluate:
        warn("no `evaluate:` section: you will not know whether it works; name questions with known answers")
    for task in recipe.evaluate:
        if any(_overlap(task.data, d) for stage in recipe.stages for d in stage.data):
            warn(f"evaluate {task.name!r} asks about {task.data.path}, which a stage trains on; hold some data out")
    return found


def _overlap(asked: DataSpec, learned: DataSpec) -> bool:
    """Whether two entries may hold the same samples, by their paths and splits."""
    return asked.path == learned.path and {asked.split, learned.split} != {"train", "held_out"}


def _stage_warnings(stage: Stage, planned: StagePlan, plan: Plan) -> list[str]:
    data, found = planned.data, []
    for part, rate in stage.train.items():
        inner = part.removeprefix("image.").partition("(")[0]
        if (usual := _HIGH.get(inner)) and rate > usual:
            found.append(
                f"learning rate {rate:g} for {part} is unusually high; such weights rarely bear more than {usual:g}"
            )
    if data.problem:
        found.append(f"its data cannot be read: {data.problem}")
    if data.bad:
        refuses = "training will refuse them" if stage.bad_samples == "refuse" else "training will skip them"
        found.append(
            f"{data.bad:,} bad samples, {refuses}; `opticnerve data check` lists them; the first: {data.first_bad}"
        )
    if plan.context and data.longest > plan.context:
        found.append(
            f"a sample has {data.longest:,} tokens, the language model takes {plan.context:,}; shorten or split it"
        )
    if data.units and data.units < stage.batch_size:
        found.append(
            f"a batch of {stage.batch_size} is larger than the data ({data.units} rows), which repeats within it"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if stage.batch_size % (stage.accumulate * world):
        found.append(
            f"batch_size {stage.batch_size} does not split over {stage.accumulate} micro-batches and {world} processes"
        )
    if planned.memory.total > plan.device["free"]:
        found.append(_too_much(stage, planned, plan.device["free"]))
    return found


def _too_much(stage: Stage, planned: StagePlan, free: int) -> str:
    remedies = []
    if any(part == "language" or part.startswith("language.last") for part in stage.train):
        remedies.append("train language.lora instead of the whole language model")
    if not stage.gradient_checkpointing:
        remedies.append("set gradient_checkpointing: true")
    if stage.batch_size > stage.accumulate:
        remedies.append(f"set accumulate: {stage.batch_size}")
    needs = f"needs about {planned.memory.total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return f"{needs}; {', or '.join(remedies) or 'use a smaller model or precision: bf16'}"
