"""AdamW over float32 masters, a learning rate per part, warm-up and decay."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from opticnerve.distributed.fsdp import as_shard, whole
from opticnerve.models.freeze import Frozen, decay_groups
from opticnerve.recipe import Stage
from opticnerve.types import OpticNerveError


class MasterAdamW:
    """AdamW (Loshchilov & Hutter 2019) whose arithmetic is float32 even where the weights are bf16.

    A bf16 weight has eight bits: most of Adam's small steps would be rounded away. So each such weight has a float32
    master that takes the step, and the weight is the master, rounded. float32 weights are their own masters.
    """

    def __init__(self, frozen: Frozen, *, betas: tuple[float, float], weight_decay: float) -> None:
        self.rates = dict(frozen.rates)
        masters = [
            [w if w.dtype == torch.float32 else w.detach().float().requires_grad_() for w in group.values()]
            for group in frozen.groups.values()
        ]
        self.adam = torch.optim.AdamW(
            decay_groups(list(frozen.groups), masters, weight_decay), lr=0.0, betas=betas, fused=True
        )
        self.weights: list[tuple[str, nn.Parameter, torch.Tensor]] = [  # name, weight, master
            (name, weight, master)
            for group, mine in zip(frozen.groups.values(), masters, strict=True)
            for (name, weight), master in zip(group.items(), mine, strict=True)
        ]

    def collect(self) -> None:
        """Move bf16 gradients into the float32 masters, adding up: no sum over micro-batches is made in bf16."""
        for _, weight, master in self.weights:
            if master is not weight and weight.grad is not None:
                master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                weight.grad = None

    def clip(self, limit: float | None) -> torch.Tensor:
        """Bring the gradients together and their norm to `limit` at most; returns the norm before, a scalar that still
        lies on the device: reading it waits for all that was computed."""
        self.collect()
        masters = [m for _, _, m in self.weights]
        return whole(torch.nn.utils.clip_grad_norm_(masters, limit if limit is not None else math.inf))

    def step(self, factor: float) -> None:
        """Take the step that the gradients, brought together by `clip`, say at `factor` × each part's learning rate."""
        for group in self.adam.param_groups:
            group["lr"] = self.rates[group["part"]] * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        with torch.no_grad():
            for _, weight, master in self.weights:
                if master is not weight:
                    weight.copy_(master)

    def skip(self, tower: str) -> None:
        """Let the weights of a tower stay as they are in this step."""
        for name, weight, master in self.weights:
            if name.startswith(f"{tower}."):
                weight.grad = master.grad = None

    def zero_grad(self) -> None:
        """Forget the gradients of this step."""
        self.adam.zero_grad(set_to_none=True)

    def master_tensors(self) -> dict[str, torch.Tensor]:
        """float32 values of the trained weights, by full name."""
        return {name: master.detach() for name, _, master in self.weights}

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """Moments and masters, whole also where they lie in shards: the same on any number of processes.

        Shards are brought together by all processes; those that say `keep=False` get nothing, and hold no more than one
        whole tensor at a time.
        """
        adam = self.adam.state_dict()
        moments = {k: _whole_values(v, keep) for k, v in adam["state"].items()}
        return {"adam": {**adam, "state": moments}, "masters": _whole_values(self.master_tensors(), keep)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly: moments, masters, and the weights rounded from them. Each process takes its shards."""
        masters = [p for group in self.adam.param_groups for p in group["params"]]
        moments = {
            k: {n: as_shard(v, masters[k]) if v.shape == masters[k].shape else v for n, v in values.items()}
            for k, values in state["adam"]["state"].items()
        }
        self.adam.load_state_dict({**state["adam"], "state": moments})
        with torch.no_grad():
            for name, weight, master in self.weights:
                master.copy_(as_shard(state["masters"][name], master))
                if master is not weight:
                    weight.copy_(master)


def schedule(step: int, steps: int, *, warmup: float, kind: str) -> float:
    """The factor on the learning rate at `step` (from 0) of `steps`: linear warm-up, then cosine, linear or
    constant."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[kind]


def check_lengthened(stage: Stage, done: int, was: int, now: int) -> None:
    """See that a stage that is made longer has trained as the longer one would have: at every step that is done both
    schedules give the same learning rate.

    Args:
        done: steps. was, now: how many the stage was to take, and is to take.

    Raises:
        OpticNerveError: they do not (a schedule that decays looks at the end from its first step on); or it would be
            shorter.
    """
    if now < was:
        raise OpticNerveError(
            f"stage {stage.name}: {now} steps are fewer than the {was} that it was begun with; it can be made longer "
            "alone",
            kind="conflict",
        )
    for step in range(done):
        before, after = (schedule(step, steps, warmup=stage.warmup, kind=stage.schedule) for steps in (was, now))
        if before != after:
            raise OpticNerveError(
                f"stage {stage.name}: at step {step + 1} the {stage.schedule} schedule of {was} steps had the learning "
                f"rate at {before:.4g} of its height, that of {now} has it at {after:.4g} (warm-up {stage.warmup:g}): "
                f"no run of {now} steps looks like this one. Go on from what it came to by a recipe with `model: "
                "{from: RUN}` and a stage of its own; `schedule: constant` can be made longer",
                kind="conflict",
            )


def _whole_values(tensors: dict[str, Any], keep: bool) -> dict[str, Any]:
    """The tensors of a mapping, whole; on the CPU those that lay in shards."""
    found = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if keep:
            found[name] = gathered if gathered is tensor else gathered.cpu()
    return found
