"""What a recipe will do and cost, before it runs: no weight is read or downloaded, unless to calibrate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from opticnerve import registry
from opticnerve.common.units import format_bytes
from opticnerve.data.collators.next_token import Collator
from opticnerve.data.encode.tokenize import Encoded
from opticnerve.language import layers
from opticnerve.language.load import load_language_config
from opticnerve.models.checkpoint.delta import weight_names
from opticnerve.models.checkpoint.source import ModelSource
from opticnerve.models.family import Family, FamilyModel
from opticnerve.models.freeze import Frozen, freeze
from opticnerve.models.vlm.build import Dock, dtype_of
from opticnerve.models.vlm.tower import placed_like
from opticnerve.objectives.next_token import NextToken
from opticnerve.ops.packed_attention import choose
from opticnerve.ops.varlen import case_of, supported
from opticnerve.plan import cost, feature_cache
from opticnerve.plan.data import StageData, inspect_data
from opticnerve.plan.model import (
    Shape,
    meta_model,
    meta_towers,
    packed_bytes,
    processor_for,
    shapes,
    tower_shapes,
)
from opticnerve.plan.remarks import Remark, remarks
from opticnerve.plan.step import Step
from opticnerve.recipe import ContinuedSpec, Recipe, Stage, TwoTowerSpec
from opticnerve.starter import weights
from opticnerve.starter.demo import SHIPPED
from opticnerve.train.setup import give_lora
from opticnerve.train.throughput import matmul_rate
from opticnerve.types import OpticNerveError

_CALIBRATION_TOKENS = 768  # a batch of about so many tokens is timed


@dataclass
class StagePlan:
    """One stage: what trains, on how much, at what cost. What could not be found out is None.

    `recomputed`: of how many layers the activations are computed again; `problem`: why the stage's budget for them
    cannot be kept; `untraced`: why activations and arithmetic were not counted."""

    name: str
    frozen: Frozen
    data: StageData
    batch_size: int
    memory: cost.Memory
    flops: int
    seconds: float | None = None
    timing: str = ""
    cache: feature_cache.CachePlan | None = None
    attention: str | None = None
    recomputed: int = 0
    untraced: str = ""
    problem: str = ""

    @property
    def shares(self) -> list[Any]:
        """The lines of the table of what trains."""
        return self.frozen.rows

    @property
    def trained(self) -> int:
        return self.frozen.trained

    @property
    def total(self) -> int:
        return self.frozen.total

    def budget_kept(self, layers: int) -> str:
        """How a budget for activations is kept, of a language model with so many layers."""
        needs = self.memory.total - self.memory.process
        return (
            f"the activations of {self.recomputed} of {layers} layers are computed again: a step needs "
            f"{format_bytes(needs)}"
        )

    @property
    def epochs(self) -> float | None:
        if not self.data.examples or self.data.steps is None:
            return None
        return self.data.steps * self.batch_size * self.data.per_row / self.data.examples

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        data, parts = self.data, [asdict(row) for row in self.shares]
        return {
            "name": self.name,
            "parts": [{k: v for k, v in part.items() if k != "dtype"} for part in parts],
            "trained": self.trained,
            "total": self.total,
            "samples": data.samples,
            "bad_samples": data.bad,
            "left_out": data.left_out,
            "steps": data.steps,
            "epochs": self.epochs,
            "sources": [asdict(source) for source in data.sources],
            "batch_size": self.batch_size,
            "tokens_per_row": data.length or None,
            "longest_sample": data.longest or None,
            "memory_bytes": self.memory.to_dict(),
            "flops_per_step": self.flops,
            "seconds": self.seconds,
            "timing": self.timing,
            "attention": self.attention,
            "recomputed_layers": self.recomputed,
            "cache_features": self.cache.to_dict() if self.cache is not None else None,
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
    layers: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plain = ("name", "precision", "visual_tokens", "context", "device")
        return {
            **{key: getattr(self, key) for key in plain},
            "shapes": [asdict(s) for s in self.shapes],
            "stages": [s.to_dict() for s in self.stages],
            "remarks": [asdict(r) for r in self.remarks],
        }


def make(recipe: Recipe, *, dock: Callable[[Recipe], Dock] | None = None) -> Plan:
    """Foresee a run.

    Args:
        dock: what `dock_recipe` gave, to calibrate with: the weights are then loaded and one short batch of each
            stage is timed. Without it, time is estimated from a measured matmul rate and counted arithmetic.

    Raises:
        OpticNerveError: the recipe's parts do not exist or do not fit each other; unreadable data is a remark.
    """
    process = cost.process_bytes()
    machine = cost.device()
    imagined: Family
    if isinstance(recipe.model, TwoTowerSpec):
        imagined = meta_towers(recipe)
        plan = Plan(recipe.name, recipe.precision, tower_shapes(recipe, imagined.model), None, None, machine)
    else:
        whole = meta_model(recipe)
        visual = max((t.max_placeholders for t in whole.towers.values()), default=None)
        context = layers.context_length(whole.language_model.config)
        plan = Plan(recipe.name, recipe.precision, shapes(recipe, whole), visual, context, machine)
        try:
            plan.processor = processor_for(recipe, whole)
        except OpticNerveError as e:
            if isinstance(recipe.model, ContinuedSpec) or Path(recipe.docked.language.name).exists():
                raise  # it will not be there when the run wants it
            plan.remarks.append(Remark("note", f"no sample is shown, and lengths are guessed: {e}"))
        plan.layers = len(layers.decoder_layers(whole.language_model)[1])
        imagined = Dock(whole, plan.processor, bases={}, lora=whole.config.lora)
    model = imagined.model
    packed = packed_bytes(recipe, model)
    docked = dock(recipe) if dock is not None and recipe.stages else None
    rate = matmul_rate(machine["type"], dtype_of(recipe)) if recipe.stages and not docked else 0.0
    for stage in recipe.stages:
        data = inspect_data(stage, plan.processor, seed=recipe.seed)
        plan.stages.append(planned := _stage(stage, imagined, data, process, plan.visual_tokens or 0, packed))
        _time(planned, stage, docked, rate, machine["type"])
        planned.cache = feature_cache.foresee(stage, model, data, flops=planned.flops, seconds=planned.seconds)
        if planned.cache is not None and planned.cache.on and planned.seconds is not None:
            planned.seconds -= planned.cache.seconds or 0.0
            planned.timing += "; with cache_features"
        try:
            planned.attention = _attention(stage, model, machine["type"])
        except OpticNerveError as e:  # it may well run elsewhere
            plan.remarks.append(Remark("warning", f"stage {stage.name}: {e}"))
        plan.sample = plan.sample or data.sample
    plan.remarks += remarks(recipe, plan, model)
    return plan


def within_budgets(recipe: Recipe) -> tuple[list[Stage], list[str]]:
    """The stages of a recipe, each `gradient_checkpointing` that is a budget settled as a number of layers; and what
    there is to say of it. The same recipe and data give the same number, on any machine.

    Raises:
        OpticNerveError: a budget cannot be kept.
    """
    if not any(isinstance(stage.gradient_checkpointing, str) for stage in recipe.stages):
        return recipe.stages, []
    made, stages, said = make(recipe), list(recipe.stages), []
    for number, (stage, planned) in enumerate(zip(recipe.stages, made.stages, strict=True)):
        if isinstance(stage.gradient_checkpointing, str):
            if planned.problem:
                raise OpticNerveError(planned.problem, kind="out-of-range")
            # No layer: as if it had not been asked for.
            stages[number] = stage.model_copy(update={"gradient_checkpointing": planned.recomputed or False})
            said.append(f"stage {stage.name}: {planned.budget_kept(made.layers)}")
    return stages, said


def context_length(recipe: Recipe) -> int | None:
    """How many tokens the recipe's language model takes."""
    if isinstance(recipe.model, ContinuedSpec):
        return layers.context_length(ModelSource.find(recipe.model.source, weights=False).config.text_config)
    language = recipe.docked.language
    return layers.context_length(load_language_config(language.name, gguf_file=language.gguf_file))


def weights_at_hand(recipe: Recipe) -> bool:
    """Whether a calibration would download nothing: every weight comes from the starter kit or a local folder."""
    if isinstance(recipe.model, TwoTowerSpec):
        return False  # nothing is timed
    if isinstance(recipe.model, ContinuedSpec):
        return recipe.model.source in SHIPPED or Path(recipe.model.source).exists()
    names = [recipe.docked.language.name]
    for tower in recipe.docked.towers.values():
        names += weight_names(registry.encoders.get(tower.encoder.type).take_name(tower.encoder.options)[0])
    return all(weights.is_starter(n) or Path(n.removeprefix("local-dir:")).exists() for n in names)


def _open_parts(dock: Family, stage: Stage, device: str) -> Frozen:
    """What the stage trains, as training opens it. LoRA that it adds stays in the model for the stages after it."""
    with torch.device(device):
        give_lora(dock, stage)
    return freeze(dock.model, stage.train)


def _stage(stage: Stage, dock: Family, data: StageData, process: int, visual: int, packed: dict[int, int]) -> StagePlan:
    """Parts, memory and arithmetic of one stage."""
    frozen = _open_parts(dock, stage, "meta")
    step, problem = Step(stage, dock, data, visual, packed), ""
    try:
        recomputed = step.recomputed()
    except OpticNerveError as e:
        if not isinstance(stage.gradient_checkpointing, str):
            raise
        recomputed, problem = step.layers, str(e)
    needed = step.memory(recomputed, process=process)
    return StagePlan(
        stage.name, frozen, data, stage.batch_size, needed, step.trace(recomputed).flops * stage.accumulate,
        recomputed=recomputed, untraced=step.untraced, problem=problem,
    )  # fmt: skip


def _attention(stage: Stage, model: FamilyModel, kind: str) -> str | None:
    """Who computes attention within the stage's packed rows, one of `ATTENTIONS` or `mask`; None where a row is one
    sample.

    Raises:
        OpticNerveError: the one that the stage names cannot do it here.
    """
    branches = stage.objective.type == "dpo" or any(spec.share_prefix for spec in stage.data)
    if model.language_model is None or (not branches and stage.pack is None):
        return None
    if not supported(model.language_model):
        return "mask"
    return choose(case_of(model.language_model, branches, torch.device(kind)), stage.attention)


def _time(planned: StagePlan, stage: Stage, docked: Dock | None, rate: float, kind: str) -> None:
    """Seconds of a stage: one real step on a short batch, or arithmetic over the machine's matmul rate."""
    steps = planned.data.steps
    if not planned.flops:
        planned.timing = f"not estimated for objective {stage.objective.type}"
        return
    if docked is not None and planned.data.rows:
        per_row = _measure(stage, docked, planned.data, kind)
        planned.timing = "a short batch was timed with the real weights"
        planned.seconds = per_row * stage.batch_size * steps if steps else None
        return
    rate = rate or matmul_rate(kind, placed_like(docked.model).dtype if docked else torch.float32)
    planned.timing = (
        f"estimated from {planned.flops / 1e9:,.0f} GFLOP a step at {cost.EFFICIENCY:.0%} of this device's "
        f"matmul rate ({rate / 1e9:,.0f} GFLOP/s)"
    )
    planned.seconds = planned.flops * steps / (rate * cost.EFFICIENCY) if steps else None


def _measure(stage: Stage, docked: Dock, data: StageData, kind: str) -> float:
    """Seconds of one training row, forward and backward."""
    model: Any = docked.model.to(kind)  # type: ignore[arg-type]
    _open_parts(docked, stage, kind)
    fitting = _CALIBRATION_TOKENS // max(1, data.length)
    count = max(1, min(stage.batch_size // stage.accumulate, len(data.rows), fitting))
    batch = Collator(docked.processor)(data.rows[:count]).to(kind)
    objective = NextToken(model)

    def step() -> None:
        loss, _ = objective(batch)
        if loss.requires_grad:  # words alone move no connector
            loss.backward()
        model.zero_grad(set_to_none=True)

    return cost.time_step(step, kind) / count
