"""What shares a stage's work between processes, as the launcher asked for it: DDP, FSDP2, or DeepSpeed's ZeRO."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from opticnerve.distributed.collectives import engine
from opticnerve.distributed.deepspeed import Zero, ZeroAdamW
from opticnerve.distributed.fsdp import Sharded
from opticnerve.models.freeze import Frozen
from opticnerve.recipe import Stage
from opticnerve.train.optim import MasterAdamW
from opticnerve.types import OpticNerveError


def sharded_if_asked(
    accelerator: Any, objective: Any, stage: Stage, before: Callable[[], None]
) -> Sharded | Zero | None:
    """The objective in shards, where several processes were launched with FSDP2 or DeepSpeed.

    Args:
        before: what wants the weights whole, and is done first.

    Raises:
        OpticNerveError: it was not tried with this model or stage.
    """
    kind = engine()
    if accelerator.num_processes == 1 or kind == "ddp":
        return None
    name = "FSDP2" if kind == "fsdp2" else "DeepSpeed"
    if objective.model.language_model is None:
        raise OpticNerveError(f"{name} is for docked language models; train this one by DDP: recipes/launch/ddp.yaml")
    if stage.compile:
        raise OpticNerveError(f"stage {stage.name}: compile was not tried with {name}; leave it out, or train by DDP")
    if kind != "fsdp2" and stage.objective.type != "next_token":
        raise OpticNerveError(
            f"stage {stage.name}: the objective {stage.objective.type} was not tried with DeepSpeed; train by DDP"
        )
    before()
    if kind != "fsdp2":
        return Zero(objective, stage=2 if kind == "zero2" else 3, device=accelerator.device)
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    return Sharded(objective, world=accelerator.num_processes, device=accelerator.device, reshard=reshard)


def make_optimizer(frozen: Frozen, stage: Stage, sharded: Sharded | Zero | None, world: int) -> MasterAdamW | ZeroAdamW:
    """The stage's AdamW over what trains."""
    if isinstance(sharded, Zero):
        rows = stage.batch_size // (stage.accumulate * world)
        return sharded.optimizer(frozen, betas=stage.betas, weight_decay=stage.weight_decay, rows=rows)
    return MasterAdamW(frozen, betas=stage.betas, weight_decay=stage.weight_decay)
