"""What must stand before the first step: the engine, the objective, the adapter, the layers that compute twice."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, InitProcessGroupKwargs, LoggerType
from transformers.modeling_layers import GradientCheckpointingLayer

from opticnerve import registry
from opticnerve.common import private_names
from opticnerve.distributed.collectives import engine, timeout, without_deepspeed
from opticnerve.language.layers import decoder_layers
from opticnerve.language.lora import has_lora
from opticnerve.models.vlm.build import Dock
from opticnerve.models.vlm.parts import is_docked_model
from opticnerve.models.vlm.tower import check_options
from opticnerve.recipe import LoraSpec, Recipe, Stage
from opticnerve.types import OpticNerveError, to_install


def make_objective(stage: Stage, model: Any) -> Any:
    """What the stage minimises, with the recipe's options."""
    spec = stage.objective
    cls = registry.objectives.get(spec.type)
    check_options("objective", spec.type, cls, spec.options)
    return cls(model, **spec.options)


def within_context(stage: Stage, model: Any) -> Stage:
    """No sample may be longer than the language model's context, whether the stage says so or not."""
    context = getattr(getattr(model.config, "text_config", None), "max_position_embeddings", None)
    if not context:
        return stage
    return stage.model_copy(update={"max_length": min(stage.max_length or context, context)})


def give_lora(dock: Dock, stage: Stage) -> None:
    """A fresh adapter for the first stage that trains one; a later stage goes on with it and may not reshape it."""
    if not has_lora(dock.model.language_model):
        dock.lora = (stage.lora or LoraSpec()).model_dump()
        dock.model.give_lora(dock.lora)
    elif stage.lora is not None and stage.lora.model_dump() != dock.lora:
        raise OpticNerveError(
            f"stage {stage.name}: lora is {stage.lora.model_dump()}, but an earlier stage's adapter is {dock.lora}; "
            f"leave lora out to go on with it, or merge it and start another recipe"
        )


def checkpoint_layers(model: Any) -> None:
    """Compute activations again instead of keeping them, in frozen layers, too.

    transformers' layers do so in `train()` only. The layer itself is set so, not what is in it: its dropouts and norms
    stay as `freeze` left them.
    """
    if not is_docked_model(model):
        raise OpticNerveError("gradient_checkpointing is for docked language models; leave it out")
    private_names.checkpoint_layers(model.language_model, model.recompute)
    for module in model.language_model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


BACKEND = "inductor"
# Where the name is not that of the package.
TRACKER_PACKAGES = {"tensorboard": "opticnerve[tensorboard]", "comet_ml": "comet-ml"}


@contextmanager
def compiled_layers(model: Any) -> Iterator[None]:
    """Within it, each layer of the language model runs compiled: one graph serves all layers and all lengths."""
    if not is_docked_model(model):
        raise OpticNerveError("compile is for docked language models; leave it out")
    _, layers = decoder_layers(model.language_model)
    for layer in layers:
        layer.compile(dynamic=True, backend=BACKEND)
    try:
        yield
    finally:
        for layer in layers:
            private_names.undo_compile(layer)


def give_memory_back() -> None:
    """Hand what was freed to the system, where the C library can (glibc).

    What loading, checking and caching have let go of would stand beside a stage's activations otherwise.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def make_accelerator(recipe: Recipe, run_dir: Path) -> Accelerator:
    """accelerate's engine: devices, processes, trackers. Mixed precision is ours (bf16 weights, float32 masters).

    Raises:
        OpticNerveError: launched with an engine that the loop does not drive; or a tracker is unknown or not installed.
    """
    engine()
    _check_trackers(recipe.trackers)
    with without_deepspeed():
        accelerator = Accelerator(
            log_with=recipe.trackers or None,
            project_dir=str(run_dir),
            dataloader_config=DataLoaderConfiguration(),
            # A connector may carry weights that only its pretraining, or only its use, needs.
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=timeout()),
            ],
        )
    if recipe.trackers:
        accelerator.init_trackers(recipe.name)
    return accelerator


def _check_trackers(names: list[str]) -> None:
    """accelerate passes over what it does not find, and a run would be without its curves."""
    known = {str(t.value): t for t in LoggerType if t is not LoggerType.ALL}
    for name in names:
        if name not in known:
            raise OpticNerveError(f"trackers: there is no {name!r}; known: {', '.join(sorted(known))}")
        if known[name] not in get_available_trackers():
            command = to_install(TRACKER_PACKAGES.get(name, name))
            raise OpticNerveError(f"trackers: {name} is not installed; run `{command}`, or set trackers=[]")
