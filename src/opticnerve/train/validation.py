"""The held-out curve of a stage: its loss on data that it does not train on, and a score of `evaluate`, every so many
steps; which look was the best, and when patience ends.

Looking changes nothing: random numbers, and which modules train, are afterwards what they were, so that the training
curve is the same bits with it and without it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from opticnerve.common.shards import whole
from opticnerve.data.encode.loader import TimedBatches, loader
from opticnerve.distributed.collectives import engine, gather_objects, on_main
from opticnerve.models.freeze import undisturbed
from opticnerve.objectives.base import Objective
from opticnerve.recipe import Stage, ValidateSpec
from opticnerve.recipe.stage import PackSpec
from opticnerve.train import checkpoint
from opticnerve.train.sampler import StageSampler
from opticnerve.train.strategy import Strategy
from opticnerve.types import DataError, OpticNerveError

Score = Callable[[str], float]
"""The name of an entry of `evaluate` → what the model as it stands scores there; more is better."""


class HeldOut:
    """The batches of held-out data, every sample once: batch i of all processes together is the same on any number of
    them.

    Args:
        sampler: of the held-out data, whose stage is what `held_out_stage` gave.
        whole_batches: the objective compares a batch's samples with each other: what fills no batch is left out.
    """

    def __init__(self, sampler: StageSampler, *, whole_batches: bool) -> None:
        self.sampler, self.collate = sampler, sampler.collate
        self.fingerprint: dict[str, Any] = {}
        self.rows, samples = sampler.stage.batch_size, len(sampler.examples)
        self.samples = samples // self.rows * self.rows if whole_batches else samples
        if not self.samples:
            raise OpticNerveError(
                f"stage {sampler.stage.name}: validate holds out {samples} samples, and the objective compares the "
                f"{self.rows} of a batch; hold out more",
                kind="out-of-range",
            )

    def __len__(self) -> int:
        return math.ceil(self.samples / self.rows)

    def mine(self, index: int) -> range:
        """This process's samples of a batch; there may be none."""
        first = index * self.rows
        return range(first + self.sampler.rank, min(first + self.rows, self.samples), self.sampler.world)

    def __getitem__(self, index: int) -> Any:
        """The batch of this process; where it has no samples a stand-in, for every process computes all batches."""
        return self.sampler.batch(self.mine(index) or range(index * self.rows, index * self.rows + 1))

    def take_left_out(self) -> list[DataError]:
        """The loader asks for bad samples that others stand in for; see `StageSampler`."""
        return self.sampler.take_left_out()

    def leave_out(self, errors: Iterable[DataError]) -> None:
        """They are told of, and count, as those of the stage's own data."""
        self.sampler.leave_out(errors)


class Validation:
    """The looks of a stage.

    Args:
        held_out: None where the score alone is wanted.
        score: asks an entry of `evaluate`, where `spec.metric` names one.
        moving: names of buffers that training moves; the best weights include them.

    Attributes:
        curve: of each look its step, and `loss`, `score` or both.
        best, best_step: of what `metric` says. worse: looks since then.
    """

    def __init__(
        self, spec: ValidateSpec, strategy: Strategy, held_out: HeldOut | None, *, seed: int, moving: list[str],
        score: Score | None = None,
    ) -> None:  # fmt: skip
        self.spec, self.strategy, self.held_out, self.seed, self.moving = spec, strategy, held_out, seed, moving
        if strategy.accelerator.num_processes > 1 and engine().startswith("zero"):
            raise OpticNerveError("validate was not tried with DeepSpeed; train by DDP or FSDP2", kind="unsupported")
        if spec.metric != "loss" and (score is None or strategy.spread):
            why = "weights are spread over processes" if strategy.spread else "nobody here asks questions"
            raise OpticNerveError(
                f"validate.metric: {spec.metric} cannot be asked: {why}; write metric: loss", kind="unsupported"
            )
        self.score = score
        self.curve: list[dict[str, float | None]] = []
        self.best, self.best_step, self.worse = math.nan, 0, 0
        self.weights: dict[str, torch.Tensor] = {}  # of the best look, on the CPU, with `keep: best`

    @property
    def done(self) -> bool:
        """Whether patience has ended."""
        return self.spec.patience is not None and self.worse >= self.spec.patience

    def due(self, step: int, steps: int) -> bool:
        """Whether a step is looked at."""
        return step % self.spec.every == 0 or step == steps

    def validate(self, step: int) -> dict[str, Any]:
        """A look: what is told of it in metrics.jsonl. Every process takes part."""
        accelerator, found = self.strategy.accelerator, dict[str, float]()
        with _unchanged(self.strategy.objective, accelerator.device, self.seed):
            if self.held_out is not None:
                found["loss"] = self._loss(self.held_out)
            if self.spec.metric != "loss":
                score, name = self.score, self.spec.metric
                assert score is not None
                found["score"] = on_main(accelerator, lambda: score(name))
        self._compare(step, found["loss"] if self.spec.metric == "loss" else found["score"])
        shown = {k: v if math.isfinite(v) else None for k, v in found.items()}  # JSON has no word for what is no number
        self.curve.append({"step": step, **shown})
        return {"validation": {**shown, "best_step": self.best_step}}

    def _compare(self, step: int, value: float) -> None:
        better = value < self.best if self.spec.metric == "loss" else value > self.best
        if not (better or (math.isnan(self.best) and not math.isnan(value))):
            self.worse += 1
            return
        self.best, self.best_step, self.worse = value, step, 0
        if self.spec.keep == "best":
            model = self.strategy.model
            found = {n: p for n, p in model.named_parameters() if p.requires_grad}
            found |= {n: model.get_buffer(n) for n in self.moving}
            for name, tensor in found.items():
                gathered = whole(tensor.detach())
                if (kept := self.weights.get(name)) is None:
                    self.weights[name] = gathered.to("cpu", copy=True)
                else:  # into the memory of the best before
                    kept.copy_(gathered)

    def _loss(self, held_out: HeldOut) -> float:
        """The mean over all that is supervised, as in a step of training."""
        device, objective = self.strategy.accelerator.device, self.strategy.objective
        workers = held_out.sampler.stage.workers
        batches = TimedBatches(loader(held_out, 0, workers, device), device)
        total, count, said = 0.0, 0, None
        objective.by_source = None
        with torch.no_grad():
            try:
                for index in range(len(held_out)):
                    batch = next(batches)
                    loss, mine = objective(batch.to(device))
                    if held_out.mine(index):
                        total, count = total + float(loss), count + int(mine)
            except OpticNerveError as e:
                said = e
        found = gather_objects(self.strategy.accelerator, (total, count, None if said is None else str(said)))
        if said is not None:
            raise said
        if other := next((text for *_, text in found if text is not None), None):
            raise OpticNerveError(other, kind="refused")
        return float(sum(t for t, *_ in found) / sum(n for _, n, _ in found))

    def restore_best(self, model: nn.Module) -> None:
        """With `keep: best`, have the whole model be what it was at the best look, which is not kept beside it."""
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for name, value in self.weights.items():
                tensors[name].copy_(value)
        self.weights.clear()

    def summary(self, steps: int) -> dict[str, Any]:
        """For the stage's result; `steps`: how many there might have been."""
        return {
            "metric": self.spec.metric, "keep": self.spec.keep, "curve": self.curve,
            "best": self.best if self.best_step else None, "best_step": self.best_step,
            "stopped": self.done and self.curve[-1]["step"] != steps,
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {
            "curve": self.curve, "best": self.best, "best_step": self.best_step, "worse": self.worse,
            "weights": self.weights,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curve, self.best, self.best_step = state["curve"], state["best"], state["best_step"]
        self.worse, self.weights = state["worse"], state["weights"]


def held_out_stage(stage: Stage, objective: Objective) -> Stage:
    """The stage as its held-out data are read: each sample once, in batches of one micro-batch (of a step, where a
    step's samples cannot be split)."""
    assert stage.validate is not None
    data = stage.validate.data or [s.model_copy(update={"weight": None, "repeat": 1}) for s in stage.data]
    rows = stage.batch_size if objective.whole_step else stage.batch_size // stage.accumulate
    pack = stage.pack.tokens if isinstance(stage.pack, PackSpec) else stage.pack
    changes = {"mixing": None, "steps": None, "epochs": None, "accumulate": 1, "batch_size": rows, "pack": pack}
    return stage.model_copy(update={**changes, "data": data})


@contextmanager
def _unchanged(objective: Objective, device: torch.device, seed: int) -> Iterator[None]:
    """Within it all modules are in `eval()`, and random numbers are the same each time; afterwards all is as before."""
    before, metrics = checkpoint.rng_state(device), objective.metrics
    with undisturbed(objective):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            checkpoint.set_rng_state(before, device)
            objective.metrics = metrics
