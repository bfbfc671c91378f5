"""One stage of training: set up, step, log, save. Over accelerate, because staging and exact resume live here."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor

from opticnerve.common import atomic
from opticnerve.common.progress import Progress
from opticnerve.common.shards import gather, state_dict_with
from opticnerve.common.units import format_bytes
from opticnerve.data.encode.loader import TimedBatches, loader
from opticnerve.distributed.collectives import add_up, attempt, barrier, companions, on_main, sequence_parallel
from opticnerve.distributed.heartbeat import LostProcess
from opticnerve.models.checkpoint.delta import now_called
from opticnerve.models.family import Family
from opticnerve.models.vlm.tower import MEDIA_INPUT
from opticnerve.ops.attention import plain_attention
from opticnerve.recipe import Recipe, Stage
from opticnerve.train import checkpoint, sharded
from opticnerve.train.divergence import Diverged, Divergence
from opticnerve.train.engine import make_accelerator
from opticnerve.train.image_ablation import image_use
from opticnerve.train.metrics import (
    METRICS,
    MetricsLog,
    by_source,
    fill,
    media_counts,
    source_counts,
    source_names,
    tracked,
)
from opticnerve.train.optim import stage_factor
from opticnerve.train.setup import StageSetup, set_up
from opticnerve.train.throughput import Throughput
from opticnerve.train.validation import Score
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: everything is saved; `checkpoint` says where."""

    def __init__(self, saved: Path) -> None:
        super().__init__(f"stopped; saved to {saved}")
        self.checkpoint = saved


@dataclass
class StageResult:
    """What one stage came to."""

    name: str
    steps: int
    samples: int
    tokens: int
    seconds: float
    final_loss: float
    skipped: Sequence[str]
    left_out: list[int] = field(default_factory=list)
    image_use: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        shown = {k: v for k, v in vars(self).items() if k != "validation" or v is not None}
        return shown | {"skipped": len(self.skipped)}


def run_stage(
    dock: Family, recipe: Recipe, stage: Stage, folder: Path, *, trained_before: set[str], resume: bool = False,
    console: Console | None = None, accelerator: Accelerator | None = None,
    ready_to_train: Callable[[], None] = lambda: None, score: Score | None = None,
) -> StageResult:  # fmt: skip
    """Train one stage in place and write its folder: freeze.json, metrics.jsonl, checkpoints, the model.

    Args:
        dock: a model of any family.
        trained_before: names of parameters that earlier stages trained; this stage's are added to it.
        resume: continue from the newest whole checkpoint in `folder`, if there is one.
        ready_to_train: called on the main process when nothing is refused any more, before the first step.
        score: what the model as it stands scores on an entry of `evaluate`; for a stage whose `validate` names one.

    Raises:
        Interrupted: stopped by a signal, after saving.
        Diverged: the loss stopped being a number; the message names step and samples.
    """
    accelerator = accelerator or make_accelerator(recipe, folder.parent.parent)
    with companions(accelerator, f"stage {stage.name}"), plain_attention(dock.model):
        barrier(accelerator)  # the main process may have evaluated for long
        ready = set_up(
            dock, recipe, stage, folder, accelerator, trained=trained_before, resume=resume, console=console,
            score=score,
        )  # fmt: skip
        on_main(accelerator, ready_to_train)
        with ready.fast_layers():
            Trainer(ready, track=bool(recipe.trackers)).train()
            ready.strategy.finish()
            state, validation = ready.state, ready.state.validation
            if validation is not None:
                validation.restore_best(dock.model)
            gathered = _gather(ready, trained_before)
            on_main(accelerator, lambda: _save_model(ready, trained_before, gathered))
            gathered.clear()
            use = image_use(ready.strategy.objective, ready.sampler)
            return StageResult(
                stage.name, state.step, state.samples, state.tokens, state.elapsed, state.loss, ready.skipped,
                state.left_out, use, None if validation is None else validation.summary(ready.sampler.steps),
            )  # fmt: skip


class Trainer:
    """The steps of a stage that is set up.

    Args:
        track: hand losses and speeds to accelerate's trackers.
    """

    def __init__(self, ready: StageSetup, *, track: bool = False) -> None:
        self.ready, self.stage, self.accelerator, self.track = ready, ready.stage, ready.accelerator, track
        self.strategy, self.optimizer = ready.strategy, ready.strategy.optimizer
        self.sampler, self.state, self.validation = ready.sampler, ready.state, ready.state.validation
        self.divergence = Divergence(ready.stage, ready.folder, ready.state, ready.strategy.model)
        self.sources = source_names(ready.stage.data)
        self.throughput = Throughput(
            self.strategy.model, self.stage, self.state, processes=self.accelerator.num_processes
        )  # fmt: skip
        self.pieces: list[int] = []  # of media in the last step
        self.log: MetricsLog | None = None
        self.stop = self.all_stop = False  # asked by a signal: of this process, of any

    def train(self) -> None:
        """All steps that are left; a checkpoint every `save_every`, and whenever something ends them before."""
        stage, state, steps, device = self.stage, self.state, self.sampler.steps, self.accelerator.device
        alone = self.accelerator.num_processes == 1
        batches = TimedBatches(loader(self.sampler, state.step * stage.accumulate, stage.workers, device), device)
        barrier(self.accelerator)  # all have read what is in the folder
        before = self.ready.steps_before if self.track else 0
        with _signals(self._ask_to_stop), self._metrics() as self.log, self._progress() as bar:
            started = time.perf_counter() - state.elapsed
            try:
                while state.step < steps and not (self.validation is not None and self.validation.done):
                    line = self.train_step(*attempt(lambda: [next(batches) for _ in range(stage.accumulate)]))
                    state.elapsed = time.perf_counter() - started
                    line |= {"elapsed_s": round(state.elapsed, 3), "waited_s": round(batches.seconds, 3)}
                    line |= {"tokens_per_second": round(state.tokens / state.elapsed, 1)}
                    line |= self.throughput.line(
                        tokens=line["tokens"], supervised=line["supervised_tokens"], pieces=self.pieces,
                        waited=batches.seconds,
                    )  # fmt: skip
                    if self.validation is not None and self.validation.due(state.step, steps):
                        looked = time.perf_counter()
                        with self.optimizer.averaged():
                            line |= self.validation.validate(state.step)
                        started += time.perf_counter() - looked  # the clock of training stands still
                    if self.log is not None:
                        self.log.write(line)
                        bar.update(line)
                    if self.track:
                        values = {f"{stage.name}/{k}": v for k, v in tracked(line).items()}
                        self.accelerator.log(values, step=before + state.step)
                    if self.all_stop or (self.stop and alone):
                        raise Interrupted(self.save())
                    if stage.save_every and state.step % stage.save_every == 0 and state.step < steps:
                        self.save()
            except (Diverged, atomic.DiskFull, LostProcess):
                raise  # the weights may be broken already, or there is no room: the checkpoints before are worth more
            except OpticNerveError:
                if state.step:
                    self.save()  # bad input never loses finished work
                raise

    def train_step(self, batches: list[Any], error: OpticNerveError | None) -> dict[str, Any]:
        """One optimizer step on this process's micro-batches, or what kept them from being made; the line of
        metrics.jsonl."""
        accelerator, state = self.accelerator, self.state
        self.divergence.before_step()
        counts = [sum(b.supervised for b in batches), sum(b.tokens for b in batches), sum(b.samples for b in batches),
                  int(self.stop), *source_counts(batches, len(self.sources)), *media_counts(batches)]  # fmt: skip
        totals = add_up(accelerator, counts, error)
        asked = totals.pop(3)
        # Processes that share a sequence counted it each.
        supervised, tokens, samples, *more = (n // sequence_parallel() for n in totals)
        of_source, self.pieces = more[: len(self.sources)], more[len(self.sources) :]
        self.all_stop = bool(asked)  # a signal reaches the processes at different moments; they leave together
        filled = fill(batches)
        batches = [b.to(accelerator.device) for b in batches]
        sums = torch.zeros(len(self.sources), device=accelerator.device)
        self.strategy.objective.by_source = sums if any(of_source) else None
        sums = torch.cat([self.strategy.backward(batches, supervised).float().view(1), sums])
        sums = accelerator.reduce(sums) if accelerator.num_processes > 1 else sums
        self._skip_unused_towers(self.pieces)
        norm, total, losses, figures = self._read(sums, self.optimizer.clip(self.stage.clip))
        loss = total / supervised
        factor = stage_factor(self.stage, state.step, self.sampler.steps)
        left_out = None
        scaled: dict[str, Any] = {"loss_scale": self.optimizer.scale} if self.optimizer.scale > 1 else {}
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step(factor)
        elif math.isfinite(loss) and self.optimizer.overflowed():
            scaled |= {"overflow": True, "grad_norm": None}
        else:
            left_out = self.divergence.handle(loss, norm, self.sampler, keep=accelerator.is_main_process)
            self.optimizer.zero_grad()
            self.ready.emit(f"step {state.step + 1} is left out: {left_out}")
        state.count(samples=samples, tokens=tokens, loss=None if left_out else loss)
        return {
            "step": state.step, "loss": loss, "tokens": tokens, "supervised_tokens": supervised, "samples": samples,
            "grad_norm": norm,
            "learning_rate": {part: rate * factor for part, rate in self.ready.frozen.rates.items()},
            **scaled,
            **filled,
            **by_source(self.sources, losses, of_source, self.strategy.objective.unit),
            **({"metrics": figures} if figures else {}),
            # JSON has no word for what is no number.
            **({"loss": None, "grad_norm": None, "left_out": left_out} if left_out else {}),
        }  # fmt: skip

    def _read(self, sums: Tensor, norm: Tensor) -> tuple[float, float, list[float], dict[str, float]]:
        """The gradient's norm, the loss sum, those of the sources and the objective's figures: the step's one wait for
        the device."""
        figures = self.strategy.objective.metrics
        there = {k: v for k, v in figures.items() if isinstance(v, Tensor) and v.device == sums.device}
        read = torch.cat([norm.float().view(1), sums, *(v.float().view(1) for v in there.values())]).tolist()
        known = dict(zip(there, read[1 + len(sums) :], strict=True))
        return read[0], read[1], read[2 : 1 + len(sums)], {k: known.get(k, v) for k, v in figures.items()}

    def save(self) -> Path:
        """A checkpoint that the stage continues from, exactly; every process takes part, one of them writes."""
        state, in_shards = sharded.take_out(self.state.state_dict())
        folder, shards = self.ready.folder, None
        if in_shards:
            remedy = "the checkpoints before it are whole; free some space and resume"
            shards = sharded.write(in_shards, folder, self.accelerator, remedy=remedy)

        def write() -> Path:
            if self.log is not None:
                self.log.sync()  # a checkpoint is never ahead of the lines
            keep = self.stage.keep_checkpoints
            return checkpoint.save(folder, self.state.step, state, keep=keep, shards=shards)

        return on_main(self.accelerator, write)

    def _skip_unused_towers(self, pieces: list[int]) -> None:
        """A tower that saw nothing in this step, on any process, does not move: as on one process, where its weights
        have no gradient. (Beside others a process gives them the gradient zero, which Adam's momentum would follow.)"""
        if self.accelerator.num_processes == 1:
            return
        for count, modality in zip(pieces, MEDIA_INPUT, strict=True):
            if not count and modality in self.strategy.model.towers:
                self.optimizer.skip(modality)

    def _ask_to_stop(self) -> None:
        self.stop = True

    def _metrics(self) -> contextlib.AbstractContextManager[MetricsLog | None]:
        main = self.accelerator.is_main_process
        return MetricsLog(self.ready.folder / METRICS, self.state.step) if main else contextlib.nullcontext()

    def _progress(self) -> Progress:
        console = self.ready.console if self.accelerator.is_main_process else None
        return Progress(self.stage.name, self.sampler.steps, start=self.state.step, console=console)


def _gather(ready: StageSetup, trained: set[str]) -> dict[str, Tensor]:
    """All of what trained and lies in shards, in the main process's memory."""
    state = ready.dock.model.state_dict()
    return gather(state, (now_called(n, state) for n in trained), keep=ready.accelerator.is_main_process)


def _save_model(ready: StageSetup, trained: set[str], gathered: dict[str, Tensor]) -> None:
    """What the stage has come to, in its folder; of what lies in shards, `gathered`."""
    try:
        with state_dict_with(ready.dock.model, gathered):
            ready.dock.save(ready.folder, trained)
    except (OSError, SafetensorError) as e:
        free = format_bytes(shutil.disk_usage(ready.folder).free)
        raise OpticNerveError(
            f"the model of stage {ready.stage.name} could not be written to {ready.folder}: {e}; {free} are free "
            f"there. Free some space, and resume",
            kind="disk-full",
        ) from e


@contextlib.contextmanager
def _signals(ask: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the loop to save and leave after its step; a second one is Python's own."""
    before: dict[Any, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before[number])
        ask()

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread: signals are somebody else's
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
