"""One stage of training: freeze, step, log, save. Small, over accelerate, because staging and exact resume live
here."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from opticnerve.common import atomic
from opticnerve.common.private_names import keep_activations
from opticnerve.common.progress import Progress
from opticnerve.data.dataset.bad_samples import BadSampleCounter
from opticnerve.data.encode.loader import TimedBatches, loader
from opticnerve.distributed.collectives import add_up, attempt, barrier, companions, on_main
from opticnerve.distributed.deepspeed import Zero, ZeroAdamW
from opticnerve.distributed.fsdp import Sharded
from opticnerve.distributed.heartbeat import LostProcess
from opticnerve.features.store import see_all
from opticnerve.language.chat_template import stage_template
from opticnerve.models.freeze import Frozen, freeze
from opticnerve.models.vlm.parts import is_docked_model, moving_buffers
from opticnerve.models.vlm.tower import MEDIA_INPUT
from opticnerve.ops.fused_layers import fuse_layers
from opticnerve.ops.kernels import KERNELS
from opticnerve.ops.offload import offload_encoder
from opticnerve.ops.vision_attention import plain_attention
from opticnerve.recipe import CacheSpec, Recipe, Stage
from opticnerve.train import data_fingerprint
from opticnerve.train import state as saving
from opticnerve.train.calibrate import calibrate
from opticnerve.train.counts import fill, media_counts
from opticnerve.train.divergence import Diverged, Divergence, samples_of
from opticnerve.train.image_ablation import image_use
from opticnerve.train.metrics import METRICS, MetricsLog
from opticnerve.train.optim import MasterAdamW, schedule
from opticnerve.train.sampler import StageSampler
from opticnerve.train.setup import (
    checkpoint_layers,
    compiled_layers,
    give_lora,
    give_memory_back,
    make_accelerator,
    make_objective,
    within_context,
)
from opticnerve.train.signals import asked_by_signals
from opticnerve.train.stage_data import make_sampler
from opticnerve.train.strategy import make_optimizer, sharded_if_asked
from opticnerve.types import OpticNerveError


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

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "skipped"} | {"skipped": len(self.skipped)}


def run_stage(
    dock: Any,
    recipe: Recipe,
    stage: Stage,
    folder: Path,
    *,
    trained_before: set[str],
    resume: bool = False,
    console: Any = None,
    accelerator: Accelerator | None = None,
) -> StageResult:
    """Train one stage in place and write its folder: freeze.json, metrics.jsonl, checkpoints, the model.

    Args:
        dock: a `Dock`, a `DualDock` or a `ClassifierDock`.
        trained_before: names of parameters that earlier stages trained; this stage's are added to it.
        resume: continue from the newest whole checkpoint in `folder`, if there is one.

    Raises:
        Interrupted: stopped by a signal, after saving.
        Diverged: the loss stopped being a number; the message names step and samples.
    """
    accelerator = accelerator or make_accelerator(recipe, folder.parent.parent)
    with companions(accelerator, f"stage {stage.name}"), plain_attention(dock.model):
        barrier(accelerator)  # the main process may have evaluated for long
        return _run_stage(dock, recipe, stage, folder, trained_before, resume, console, accelerator)


def _run_stage(
    dock: Any, recipe: Recipe, stage: Stage, folder: Path, trained_before: set[str], resume: bool, console: Any,
    accelerator: Accelerator,
) -> StageResult:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    model, processor = dock.model, dock.processor
    stage = within_context(stage, model)
    torch.manual_seed(recipe.seed)
    if "language.lora" in stage.train:
        give_lora(dock, stage)
    frozen = freeze(model, stage.train)
    if stage.gradient_checkpointing:
        checkpoint_layers(model)
    trained_before |= {n for group in frozen.groups.values() for n in group}
    if accelerator.is_main_process:
        atomic.clear_left_overs(folder)
        atomic.write_json(folder / "freeze.json", frozen.to_dict())
        if console is not None:
            console.print(frozen.table())

    skipped = BadSampleCounter(stage.bad_samples, stage.name)
    on_error = skipped if stage.bad_samples != "refuse" else None
    template = stage_template(stage.template, processor.tokenizer)
    objective = make_objective(stage, model)
    collate = objective.collator(processor, stage, recipe.seed)
    sampler = make_sampler(
        stage, processor, seed=recipe.seed, rank=accelerator.process_index, world=accelerator.num_processes,
        template=template, collate=collate, skipped=skipped, console=console,
    )  # fmt: skip
    model.to(accelerator.device)
    if stage.cache_features:
        spec = stage.cache_features if isinstance(stage.cache_features, CacheSpec) else CacheSpec()
        store = see_all(
            model, processor, sampler.pictures(), budget=spec.budget, stored=spec.dtype,
            rank=accelerator.process_index, world=accelerator.num_processes, wait=lambda: barrier(accelerator),
            threads=stage.workers or None, on_error=on_error, console=console,
        )  # fmt: skip
        sampler.use_features(store)
    sharded = sharded_if_asked(accelerator, objective, stage, lambda: calibrate(model, sampler.whole()))
    if sharded is not None:
        dock.model, objective, frozen = sharded.model, sharded.objective, sharded.trained(frozen)
    if stage.cache_features and sharded is None:
        offload_encoder(model.image.encoder, folder, console)
    optimizer = make_optimizer(frozen, stage, sharded, accelerator.num_processes)
    run = Run(
        dock, recipe, stage, folder, frozen, optimizer, sampler, accelerator, trained_before, console, objective,
        sharded,
    )  # fmt: skip
    if not (resume and saving.restore(run)):
        calibrate(model, sampler.whole())  # the same on every process
    run.skipped = skipped
    try:
        with contextlib.ExitStack() as stack:
            functions = KERNELS[stage.kernels](accelerator.device) if stage.kernels else None
            stack.enter_context(fuse_layers(getattr(dock.model, "language_model", torch.nn.Module()), functions))
            if stage.compile:
                stack.enter_context(compiled_layers(model))
            give_memory_back()
            return run.go()
    finally:
        model.eval()
        if stage.gradient_checkpointing:
            keep_activations(model.language_model)


class Run:
    """The state of a stage in progress."""

    def __init__(
        self, dock: Any, recipe: Recipe, stage: Stage, folder: Path, frozen: Frozen, optimizer: MasterAdamW | ZeroAdamW,
        sampler: StageSampler, accelerator: Accelerator, trained: set[str], console: Any, objective: Any,
        sharded: Sharded | Zero | None,
    ) -> None:  # fmt: skip
        self.dock, self.recipe, self.stage, self.folder, self.frozen = dock, recipe, stage, folder, frozen
        self.optimizer, self.sampler, self.accelerator, self.trained = optimizer, sampler, accelerator, trained
        self.console = console
        self.objective = self.wrapped = objective
        self.sharded = sharded
        if accelerator.num_processes > 1 and not objective.whole_step and sharded is None:
            self.wrapped = accelerator.prepare_model(objective)
        self.step, self.samples, self.tokens, self.elapsed, self.loss = 0, 0, 0, 0.0, math.nan
        self.skipped: Sequence[str] = []
        self.moving = moving_buffers(dock.model, optimizer.master_tensors())
        self.data = data_fingerprint.fingerprint(sampler)
        self.divergence = Divergence(stage, folder, dock.model, self.moving)
        self.stop = self.asked = False
        self.log: MetricsLog | None = None

    # -- the loop -------------------------------------------------------------------------------------------------

    def go(self) -> StageResult:
        stage, steps, main = self.stage, self.sampler.steps, self.accelerator.is_main_process
        device = self.accelerator.device
        batches = TimedBatches(loader(self.sampler, self.step * stage.accumulate, stage.workers, device), device)
        barrier(self.accelerator)  # all have read what is in the folder
        with contextlib.ExitStack() as stack:
            stack.enter_context(asked_by_signals(self._ask_to_stop))
            if main:
                self.log = stack.enter_context(MetricsLog(self.folder / METRICS, self.step))
            bar = stack.enter_context(self._progress(steps))
            started = time.perf_counter() - self.elapsed
            try:
                while self.step < steps:
                    line = self._one_step(*attempt(lambda: [next(batches) for _ in range(stage.accumulate)]))
                    self.elapsed = time.perf_counter() - started
                    line |= {"elapsed_s": round(self.elapsed, 3), "waited_s": round(batches.seconds, 3)}
                    line |= {"tokens_per_second": round(self.tokens / self.elapsed, 1)}
                    if self.log is not None:
                        self.log.write(line)
                        bar.update(line)
                    if self.recipe.trackers:
                        self._track(line)
                    if self.asked or (self.stop and self.accelerator.num_processes == 1):
                        raise Interrupted(saving.save(self))
                    if stage.save_every and self.step % stage.save_every == 0 and self.step < steps:
                        saving.save(self)
            except (Diverged, atomic.DiskFull, LostProcess):
                raise  # the weights may be broken already, or there is no room: the checkpoints before are worth more
            except OpticNerveError:
                if self.step:
                    saving.save(self)  # bad input never loses finished work
                raise
        if self.sharded is not None:
            self.dock.model, self.objective = self.sharded.bring_together()
        on_main(self.accelerator, lambda: saving.save_model(self))
        use = image_use(self.dock.model, self.objective, self.sampler)
        return StageResult(
            stage.name, steps, self.samples, self.tokens, self.elapsed, self.loss, self.skipped,
            self.divergence.left_out, use,
        )  # fmt: skip

    def _one_step(self, batches: list[Any], error: OpticNerveError | None) -> dict[str, Any]:
        accelerator = self.accelerator
        self.divergence.before_step()
        counts = [sum(b.supervised for b in batches), sum(b.tokens for b in batches), sum(b.samples for b in batches),
                  int(self.stop), *media_counts(batches)]  # fmt: skip
        supervised, tokens, samples, asked, *pieces = add_up(accelerator, counts, error)
        self.asked = bool(asked)  # a signal reaches the processes at different moments; they leave after the same step
        batches = [b.to(accelerator.device) for b in batches]
        total = self._backward(batches, supervised)
        total = accelerator.reduce(total) if accelerator.num_processes > 1 else total
        self._skip_unused_towers(pieces)
        # Reading the two is the step's one wait for the device.
        total, norm = torch.stack([total.float(), self.optimizer.clip(self.stage.clip).float()]).tolist()
        loss = total / supervised
        factor = schedule(self.step, self.sampler.steps, warmup=self.stage.warmup, kind=self.stage.schedule)
        left_out = None
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.apply(factor)
            self.loss = loss
        else:
            keep = accelerator.is_main_process
            left_out = self.divergence.handle(self.step + 1, loss, norm, samples_of(self.sampler, self.step), keep=keep)
            self.optimizer.zero_grad()
            self.emit(f"step {self.step + 1} is left out: {left_out}")
        self.step += 1
        self.tokens += int(tokens)
        self.samples += int(samples)
        return {
            "step": self.step, "loss": loss, "tokens": int(tokens), "supervised_tokens": int(supervised),
            "samples": int(samples), "grad_norm": norm,
            "learning_rate": {part: rate * factor for part, rate in self.frozen.rates.items()},
            **fill(batches),
            **({"metrics": dict(self.objective.metrics)} if self.objective.metrics else {}),
            # JSON has no word for what is no number.
            **({"loss": None, "grad_norm": None, "left_out": left_out} if left_out else {}),
        }  # fmt: skip

    def _backward(self, batches: list[Any], supervised: int) -> torch.Tensor:
        """Gradients of the mean loss over all micro-batches of all processes; this process's loss sum."""
        accelerator, total = self.accelerator, torch.zeros((), device=self.accelerator.device)
        if isinstance(self.optimizer, ZeroAdamW):
            return self.optimizer.backward(batches, accelerator.num_processes / supervised)
        if self.objective.whole_step:
            alone = self.optimizer.collect if accelerator.num_processes == 1 else None
            return total + self.objective.backward(batches, 1.0 / supervised, after_each=alone)
        for k, batch in enumerate(batches):
            last = k == len(batches) - 1
            # Shards are summed at once: gradients of all weights would lie whole on each process until the last.
            at_once = last or self.sharded is not None
            with contextlib.nullcontext() if at_once else accelerator.no_sync(self.wrapped):
                loss, _ = self.wrapped(batch)
                # Summed over processes by all-reduce, which averages: hence the number of processes.
                if loss.requires_grad:  # text alone teaches nothing where only a tower's parts train
                    (loss * (accelerator.num_processes / supervised)).backward()
            if accelerator.num_processes == 1 or self.sharded is not None:  # DDP's all-reduce wants them left in place
                self.optimizer.collect()
            total += loss.detach()
        return total

    def _skip_unused_towers(self, pieces: list[int]) -> None:
        """A tower that saw nothing in this step, on any process, does not move: as on one process, where its weights
        have no gradient. (Beside others a process gives them the gradient zero, which Adam's momentum would follow.)"""
        if self.accelerator.num_processes == 1 or not is_docked_model(self.dock.model):
            return
        for count, modality in zip(pieces, MEDIA_INPUT, strict=True):
            if not count:
                self.optimizer.skip(modality)

    # -- around it ------------------------------------------------------------------------------------------------

    def _ask_to_stop(self) -> None:
        self.stop = True

    def emit(self, what: str) -> None:
        if self.accelerator.is_main_process:
            (self.console.print if self.console is not None else print)(what)

    def _track(self, line: dict[str, Any]) -> None:
        named = {k: line[k] for k in ("loss", "grad_norm", "tokens_per_second") if line[k] is not None}
        self.accelerator.log({f"{self.stage.name}/{k}": v for k, v in named.items()}, step=self.step)

    def _progress(self, steps: int) -> Progress:
        quiet = self.console is None or not self.accelerator.is_main_process
        return Progress(self.stage.name, steps, start=self.step, console=None if quiet else self.console)
