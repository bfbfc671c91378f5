"""accelerate's engine, as a run begins it: devices, processes, trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    LoggerType,
    disable_fsdp_ram_efficient_loading,
)

from opticnerve.distributed.collectives import engine, timeout, without_engines
from opticnerve.recipe import Recipe
from opticnerve.train.memory import expandable_segments
from opticnerve.types import OpticNerveError, to_install

# Where the name is not that of the package.
_EXTRAS = ("tensorboard", "wandb", "mlflow", "trackio")
TRACKER_PACKAGES = {name: f"opticnerve[{name}]" for name in _EXTRAS} | {"comet_ml": "comet-ml"}


def make_accelerator(recipe: Recipe, run_dir: Path) -> Accelerator:
    """accelerate's engine: devices, processes, trackers. Mixed precision is ours (bf16 weights, float32 masters).

    Raises:
        OpticNerveError: launched with an engine that the loop does not drive; or a tracker is unknown or not installed.
    """
    kind = engine()
    expandable_segments()
    _check_trackers(recipe.trackers)
    with without_engines():
        # A connector may carry weights that only its pretraining, or only its use, needs.
        handlers = [
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=timeout()),
        ]
        accelerator = Accelerator(
            log_with=recipe.trackers or None, project_dir=str(run_dir), kwargs_handlers=handlers
        )  # fmt: skip
    if kind == "fsdp2":
        # accelerate's launcher asks transformers for it by default: processes other than the first would load weights
        # without values, for accelerate to send them. Here each reads what it needs.
        disable_fsdp_ram_efficient_loading()
    if recipe.trackers:
        accelerator.init_trackers(recipe.name, config=tracked_settings(recipe.model_dump(mode="json")))
    return accelerator


def tracked_settings(value: object, above: str = "") -> dict[str, Any]:
    """A recipe's settings as trackers take them, `stages.0.steps: 500`; what is left out, and empty, is not told."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, inner in items for k, v in tracked_settings(inner, f"{above}.{key}").items()}
    return {} if value is None else {above.lstrip("."): value}


def _check_trackers(names: list[str]) -> None:
    """accelerate passes over what it does not find, and a run would be without its curves."""
    known = {str(t.value): t for t in LoggerType if t is not LoggerType.ALL}
    for name in names:
        if name not in known:
            raise OpticNerveError(
                f"trackers: there is no {name!r}; known: {', '.join(sorted(known))}", kind="unknown-name"
            )
        if known[name] not in get_available_trackers():
            command = to_install(TRACKER_PACKAGES.get(name, name))
            raise OpticNerveError(
                f"trackers: {name} is not installed; run `{command}`, or set trackers=[]", kind="not-installed"
            )
