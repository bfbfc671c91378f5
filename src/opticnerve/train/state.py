"""Where a stage is: all that it goes on from exactly, on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator

from opticnerve.common.version import __version__
from opticnerve.distributed.collectives import gather_objects
from opticnerve.language.adapters import current_name
from opticnerve.models.vlm.parts import moving_buffers
from opticnerve.train import checkpoint, precheck
from opticnerve.train.optim import check_lengthened
from opticnerve.train.sampler import StageSampler
from opticnerve.train.strategy import Strategy
from opticnerve.train.validation import Validation


class TrainState:
    """Weights (float32 masters) and optimizer; the step, which is the place in the schedule and, with the seed, in the
    data and the packs; every process's random numbers; the buffers that move; and what has been counted so far.

    Args:
        data: the fingerprint of the data, which must be the same when the stage goes on.
        folder: of the stage.

    Attributes:
        step: how many are done. samples, tokens: seen in them. elapsed: seconds. loss: of the last one that was taken.
        left_out: the steps whose update was left out, from 1.
        moving: full names of the buffers that training moves. validation: the held-out curve, where the stage has one.
    """

    def __init__(self, strategy: Strategy, sampler: StageSampler, data: dict[str, Any], folder: Path) -> None:
        self.step, self.samples, self.tokens, self.elapsed, self.loss = 0, 0, 0, 0.0, math.nan
        self.left_out: list[int] = []
        self.moving = moving_buffers(strategy.model, strategy.optimizer.master_tensors())
        self.validation: Validation | None = None
        self._strategy, self._sampler, self._data, self._folder = strategy, sampler, data, folder

    def count(self, *, samples: int, tokens: int, loss: float | None) -> None:
        """One more step is done; `loss` is None where it was left out."""
        self.step, self.samples, self.tokens = self.step + 1, self.samples + samples, self.tokens + tokens
        self.loss = self.loss if loss is None else loss

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; every process takes part, the main one alone gets the optimizer's, if these do not
        stay in shards."""
        accelerator, model = self._strategy.accelerator, self._strategy.model
        return {
            "optimizer": self._strategy.optimizer_state(),
            "buffers": {n: model.get_buffer(n).detach().cpu() for n in self.moving},
            "rng": gather_objects(accelerator, checkpoint.rng_state(accelerator.device)),
            "data": self._data,
            "versions": versions(),
            "samples": self.samples, "tokens": self.tokens, "elapsed": self.elapsed, "loss": self.loss,
            "left_out": self.left_out, "visits": self._sampler.state_dict(),
            **({} if self.validation is None else {"validation": self.validation.state_dict()}),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], emit: Callable[[str], None] = print) -> None:
        """Go on from a checkpoint; `emit` takes what is to be said of it.

        Raises:
            OpticNerveError: its data were others, or the stage was made longer and had another schedule.
        """
        was, sampler = state["data"], self._sampler
        precheck.check_same(was, precheck.of_length(was, self._data, sampler.plan), self._folder)
        if was["steps"] != sampler.steps:
            check_lengthened(sampler.stage, state["step"], was["steps"], sampler.steps)
            emit(f"from step {state['step']} on to step {sampler.steps} instead of {was['steps']}")
        kept = state["optimizer"]
        masters = {current_name(n): t for n, t in kept["masters"].items()}
        self._strategy.optimizer.load_state_dict({**kept, "masters": masters})
        for name, value in state["buffers"].items():
            self._strategy.model.get_buffer(name).copy_(value)
        self._sampler.load_state_dict(state["visits"])
        if self.validation is not None and "validation" in state:
            self.validation.load_state_dict(state["validation"])
        load_rng_state(state["rng"], self._strategy.accelerator, emit)
        self.step, self.samples, self.tokens = state["step"], state["samples"], state["tokens"]
        self.elapsed, self.loss, self.left_out = state["elapsed"], state["loss"], list(state["left_out"])
        if (now := versions()) != state["versions"]:
            emit(f"the checkpoint was written by {state['versions']}, this is {now}: not the same to the last bit")


def versions() -> dict[str, str]:
    """Of what a curve depends on, to the last bit."""
    return {"opticnerve": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__}


def load_rng_state(states: list[dict[str, Any]], accelerator: Accelerator, emit: Callable[[str], None]) -> None:
    """Each process its own generators; on another number of processes the first alone has any to go on with, and the
    others begin theirs as in a fresh run."""
    rank, world = accelerator.process_index, accelerator.num_processes
    if len(states) != world:
        emit(f"the checkpoint is of {len(states)} processes, these are {world}: dropout draws other numbers")
    if rank == 0 or len(states) == world:
        checkpoint.set_rng_state(states[rank], accelerator.device)
