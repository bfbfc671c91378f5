"""How a stage's work is spread over processes, as the launcher asked for it: not at all, DDP, FSDP2, or DeepSpeed's
ZeRO. The loop asks a `Strategy`, and never which one it is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from opticnerve.common.private_names import is_stateful
from opticnerve.distributed.collectives import engine, sequence_group, sequence_parallel
from opticnerve.distributed.deepspeed import Zero
from opticnerve.distributed.fsdp import Sharded
from opticnerve.language.adapters import our_layers
from opticnerve.language.experts import is_expert
from opticnerve.language.quantization import quantized_layers
from opticnerve.models.freeze import Frozen
from opticnerve.objectives.base import Objective
from opticnerve.objectives.next_token import NextToken
from opticnerve.ops.varlen import supported
from opticnerve.recipe import Stage
from opticnerve.train.optim import MasterAdamW
from opticnerve.types import OpticNerveError


class Optimizer(Protocol):
    """What `MasterAdamW` does, and `ZeroAdamW` over shares."""

    scale: float

    def overflowed(self) -> bool: ...
    def clip(self, limit: float | None) -> Tensor: ...
    def skip(self, tower: str) -> None: ...
    def averaged(self) -> AbstractContextManager[None]: ...
    def finish(self) -> None: ...
    def step(self, factor: float) -> None: ...
    def zero_grad(self) -> None: ...
    def master_tensors(self) -> dict[str, Tensor]: ...
    def state_dict(self, *, keep: bool = True) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Strategy:
    """Each process holds the whole model; where there are several, DDP brings their gradients together.

    Attributes:
        model, objective: what is trained; under FSDP2 and ZeRO twins of the whole ones, in shards, until `finish`.
        optimizer: over what trains of them.
    """

    spread = False
    """Whether the weights lie in shards: their gradients are summed at once, or those of all weights would lie whole on
    each process until the last micro-batch."""
    optimizer: Optimizer
    mesh: DeviceMesh | None = None
    """Over which the model lies in shards from its load on, if it does: its checkpoints are in shards, too."""
    _twin: Sharded | Zero | None = None

    def __init__(self, accelerator: Accelerator, objective: Objective, frozen: Frozen, stage: Stage) -> None:
        self.accelerator, self.objective, self.model = accelerator, objective, objective.model
        objective.processes = sequence_group(accelerator)
        self.optimizer = self._adam = MasterAdamW(
            frozen, betas=stage.betas, weight_decay=stage.weight_decay, name=stage.optimizer,
            layer_decay=stage.layer_decay, ema=stage.ema,
        )  # fmt: skip
        by_ddp = accelerator.num_processes > 1 and not objective.whole_step and not self.spread
        self._wrapped = accelerator.prepare_model(objective) if by_ddp else objective

    def backward(self, batches: Sequence[Any], supervised: int) -> Tensor:
        """Gradients of the mean loss over all micro-batches of all processes; this process's loss sum."""
        accelerator, total = self.accelerator, torch.zeros((), device=self.accelerator.device)
        world = accelerator.num_processes
        if self.objective.whole_step:
            alone = self._adam.collect if world == 1 else None
            return total + self.objective.backward(batches, self.optimizer.scale / supervised, after_each=alone)
        for k, batch in enumerate(batches):
            at_once = self.spread or k == len(batches) - 1
            with contextlib.nullcontext() if at_once else accelerator.no_sync(self._wrapped):
                loss, _ = self._wrapped(batch)
                # Summed over processes by all-reduce, which averages: hence the number of processes.
                if loss.requires_grad:  # text alone teaches nothing where only a tower's parts train
                    (loss * (self.optimizer.scale * world / supervised)).backward()
            if world == 1 or self.spread:  # DDP's all-reduce wants them left in place
                self._adam.collect()
            total += loss.detach()
        return total

    def optimizer_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the optimizer; every process takes part, and the main one alone gets what was
        brought together."""
        return self.optimizer.state_dict(keep=self.accelerator.is_main_process)

    def finish(self) -> None:
        """Have `model` and `objective` be the whole ones, with what was learned, on every process. The optimizer is
        gone: its masters and moments would stand beside what is brought together, saved and looked at."""
        self.optimizer.finish()
        del self.optimizer
        vars(self).pop("_adam", None)
        self.objective.processes = None
        if self._twin is not None:
            self.model, self.objective = self._twin.bring_together()


class _FSDP2(Strategy):
    spread = True

    def __init__(self, accelerator: Accelerator, objective: Objective, frozen: Frozen, stage: Stage) -> None:
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
        world, device = accelerator.num_processes, accelerator.device
        self._twin = twin = Sharded(objective, world=world, device=device, reshard=reshard)
        super().__init__(accelerator, twin.objective, twin.trained(frozen), stage)
        self.mesh = twin.mesh if twin.stays else None

    def optimizer_state(self) -> dict[str, Any]:
        return self._adam.state_dict(in_shards=True) if self.mesh is not None else super().optimizer_state()


class _Zero(Strategy):
    spread = True

    def __init__(self, accelerator: Accelerator, objective: Objective, frozen: Frozen, stage: Stage) -> None:
        self._twin = self._zero = zero = Zero(
            objective, stage=2 if engine() == "zero2" else 3, device=accelerator.device
        )
        self.accelerator, self.objective, self.model = accelerator, zero.objective, zero.model
        rows = stage.batch_size // (stage.accumulate * accelerator.num_processes)
        self.optimizer = zero.optimizer(
            zero.trained(frozen), betas=stage.betas, weight_decay=stage.weight_decay, rows=rows
        )

    def backward(self, batches: Sequence[Any], supervised: int) -> Tensor:
        return self._zero.backward(batches, self.accelerator.num_processes / supervised)


def make_strategy(accelerator: Accelerator, objective: Objective, frozen: Frozen, stage: Stage) -> Strategy:
    """The strategy that the launcher asked for.

    Raises:
        OpticNerveError: it was not tried with this model or stage.
    """
    kind = engine()
    if sequence_parallel() > 1:
        _check_shareable(objective, stage)
    if accelerator.num_processes == 1 or kind == "ddp":
        return Strategy(accelerator, objective, frozen, stage)
    name = "FSDP2" if kind == "fsdp2" else "DeepSpeed"
    if objective.model.language_model is None:
        raise OpticNerveError(
            f"{name} is for docked language models; train this one by DDP: recipes/launch/ddp.yaml", kind="unsupported"
        )
    if quantized_layers(objective.model):
        raise OpticNerveError(
            f"stage {stage.name}: quantised weights were not tried with {name}; leave quantize out, or train by DDP",
            kind="unsupported",
        )
    if any(is_expert(name) for name, _ in our_layers(objective.model)):
        raise OpticNerveError(
            f"stage {stage.name}: an adapter on experts was not tried with {name}; leave them out of lora.targets, or "
            "train by DDP",
            kind="unsupported",
        )
    if any(p.dtype == torch.float16 for p in objective.model.parameters()):
        raise OpticNerveError(f"precision: fp16 was not tried with {name}; write bf16", kind="unsupported")
    options = {"optimizer": stage.optimizer != "adamw", "layer_decay": stage.layer_decay, "ema": stage.ema}
    if given := next((key for key, value in options.items() if value), None):
        raise OpticNerveError(
            f"stage {stage.name}: {given} was not tried with {name}; leave it out, or train by DDP", kind="unsupported"
        )
    if stage.compile:
        raise OpticNerveError(
            f"stage {stage.name}: compile was not tried with {name}; leave it out, or train by DDP", kind="unsupported"
        )
    if kind != "fsdp2" and stage.objective.type != "next_token":
        raise OpticNerveError(
            f"stage {stage.name}: the objective {stage.objective.type} was not tried with DeepSpeed; train by DDP",
            kind="unsupported",
        )
    if objective.ddp_only or objective.own_parameters():
        raise OpticNerveError(
            f"stage {stage.name}: the objective {stage.objective.type} was not tried with {name}; train by DDP",
            kind="unsupported",
        )
    return (_FSDP2 if kind == "fsdp2" else _Zero)(accelerator, objective, frozen, stage)


def _check_shareable(objective: Objective, stage: Stage) -> None:
    """See that several processes can share a sequence of this model.

    Raises:
        OpticNerveError: something in it looks at other positions by another way than attention.
    """
    size, language = sequence_parallel(), objective.model.language_model
    heads = 0 if language is None else int(language.config.get_text_config(decoder=True).num_attention_heads)
    towers = () if language is None else objective.model.towers.values()
    problems = {
        f"the objective {stage.objective.type} reads whole sequences": not isinstance(objective, NextToken),
        "the model has no language model of transformers' attention": language is None or not supported(language),
        "the language model carries a state from position to position": language is not None and is_stateful(language),
        "a fusion other than splice looks at positions": any(t.fusion.placeholders(2) != 2 for t in towers),
        f"its {heads} heads do not divide by {size}": bool(heads % size),
    }
    if problem := next((words for words, there in problems.items() if there), None):
        raise OpticNerveError(
            f"stage {stage.name}: parallelism_config_sp_size {size}: {problem}; leave parallelism_config out",
            kind="unsupported",
        )
