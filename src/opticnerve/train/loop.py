"""One stage of training: freeze, step, log, save. Small, over accelerate, because staging and exact resume live
here."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from opticnerve.data.loader import Waiting, loader
from opticnerve.data.source import load_units
from opticnerve.language.chat_template import CAPTION_ONLY, with_parts
from opticnerve.language.lean import lean
from opticnerve.models.parts import is_docked_model, moving_buffers
from opticnerve.models.tower import MEDIA_INPUT
from opticnerve.recipe import CacheSpec, Recipe, Stage
from opticnerve.train import checkpoint
from opticnerve.train.calibrate import calibrate
from opticnerve.train.feature_cache import see_all
from opticnerve.train.freeze import Frozen, freeze
from opticnerve.train.optim import MasterAdamW, schedule
from opticnerve.train.prepare import (
    checkpoint_layers,
    compiled_layers,
    give_lora,
    give_memory_back,
    make_accelerator,
    make_objective,
    within_context,
)
from opticnerve.train.progress import Progress
from opticnerve.train.visits import Visits, samples_to_check, usable_units
from opticnerve.types import OpticNerveError


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: everything is saved; `checkpoint` says where."""

    def __init__(self, saved: Path) -> None:
        super().__init__(f"stopped; saved to {saved}")
        self.checkpoint = saved


class Diverged(OpticNerveError):
    """The loss stopped being a number."""


@dataclass
class StageResult:
    """What one stage came to."""

    name: str
    steps: int
    samples: int
    tokens: int
    seconds: float
    final_loss: float
    skipped: list[str]

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
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = accelerator or make_accelerator(recipe, folder.parent.parent)
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
        _write_json(folder / "freeze.json", frozen.to_dict())
        if console is not None:
            console.print(frozen.table())

    skipped: list[str] = []
    on_error = (lambda e: skipped.append(str(e))) if stage.bad_samples == "skip" else None
    template = with_parts(CAPTION_ONLY) if stage.template == "caption" else None
    objective = make_objective(stage, model)
    collate = objective.collator(processor, stage, recipe.seed)
    units = usable_units(
        load_units(stage.data, on_error=on_error), processor, stage, template=template, on_error=on_error,
        collate=collate, check=samples_to_check(stage),
    )  # fmt: skip
    visits = Visits(
        units, stage, processor, seed=recipe.seed, rank=accelerator.process_index, world=accelerator.num_processes,
        template=template, collate=collate,
    )  # fmt: skip
    model.to(accelerator.device)
    if stage.cache_features:
        spec = stage.cache_features if isinstance(stage.cache_features, CacheSpec) else CacheSpec()
        store = see_all(
            model, processor, visits.pictures(), budget=spec.budget, stored=spec.dtype,
            rank=accelerator.process_index, world=accelerator.num_processes, wait=accelerator.wait_for_everyone,
            threads=stage.workers or None, on_error=on_error, console=console,
        )  # fmt: skip
        visits.use_features(store)
    optimizer = MasterAdamW(frozen, betas=stage.betas, weight_decay=stage.weight_decay)
    run = _Run(dock, recipe, stage, folder, frozen, optimizer, visits, accelerator, trained_before, console, objective)
    if not (resume and run.restore()):
        calibrate(model, visits.whole())  # the same on every process
    run.skipped = skipped
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(lean(getattr(model, "language_model", torch.nn.Module())))
            if stage.compile:
                stack.enter_context(compiled_layers(model))
            give_memory_back()
            return run.go()
    finally:
        model.eval()
        if stage.gradient_checkpointing:
            model.language_model.gradient_checkpointing_disable()


class _Run:
    """The state of a stage in progress."""

    def __init__(
        self, dock: Any, recipe: Recipe, stage: Stage, folder: Path, frozen: Frozen, optimizer: MasterAdamW,
        visits: Visits, accelerator: Accelerator, trained: set[str], console: Any, objective: Any,
    ) -> None:  # fmt: skip
        self.dock, self.recipe, self.stage, self.folder, self.frozen = dock, recipe, stage, folder, frozen
        self.optimizer, self.visits, self.accelerator, self.trained = optimizer, visits, accelerator, trained
        self.console = console
        self.objective = self.wrapped = objective
        if accelerator.num_processes > 1 and not objective.whole_step:
            self.wrapped = accelerator.prepare_model(objective)
        self.step, self.samples, self.tokens, self.elapsed, self.loss = 0, 0, 0, 0.0, math.nan
        self.skipped: list[str] = []
        self.stop = False

    # -- the loop -------------------------------------------------------------------------------------------------

    def go(self) -> StageResult:
        stage, steps = self.stage, self.visits.steps
        metrics = self.folder / "metrics.jsonl"
        _keep_lines(metrics, self.step)
        first = self.step * stage.accumulate
        device = self.accelerator.device
        batches = Waiting(loader(self.visits, first, stage.workers, device), device)
        started = time.perf_counter() - self.elapsed
        with _signals(self._ask_to_stop), metrics.open("a") as log, self._progress(steps) as bar:
            try:
                while self.step < steps:
                    line = self._one_step([next(batches) for _ in range(stage.accumulate)])
                    self.elapsed = time.perf_counter() - started
                    line |= {"elapsed_s": round(self.elapsed, 3), "waited_s": round(batches.seconds, 3)}
                    line |= {"tokens_per_second": round(self.tokens / self.elapsed, 1)}
                    if self.accelerator.is_main_process:
                        log.write(json.dumps(line) + "\n")
                        log.flush()
                        bar.update(line)
                    if self.recipe.trackers:
                        flat = {
                            "loss": line["loss"],
                            "grad_norm": line["grad_norm"],
                            "tokens_per_second": line["tokens_per_second"],
                        }
                        self.accelerator.log({f"{stage.name}/{k}": v for k, v in flat.items()}, step=self.step)
                    if self.stop:
                        raise Interrupted(self.save())
                    if stage.save_every and self.step % stage.save_every == 0 and self.step < steps:
                        self.save()
            except Diverged:
                raise  # the weights may be broken already: the checkpoints before are worth more
            except OpticNerveError:
                if self.step:
                    self.save()  # bad input never loses finished work
                raise
        if self.accelerator.is_main_process:
            self.dock.save(self.folder, self.trained)
        return StageResult(stage.name, steps, self.samples, self.tokens, self.elapsed, self.loss, self.skipped)

    def _one_step(self, batches: list[Any]) -> dict[str, Any]:
        accelerator = self.accelerator
        counts = [sum(b.supervised for b in batches), sum(b.tokens for b in batches), sum(b.samples for b in batches),
                  *_media_counts(batches)]  # fmt: skip
        if accelerator.num_processes > 1:
            counts = accelerator.reduce(torch.tensor(counts, device=accelerator.device)).tolist()
        supervised, tokens, samples, *pieces = counts
        batches = [b.to(accelerator.device) for b in batches]
        total = self._backward(batches, supervised)
        total = accelerator.reduce(total) if accelerator.num_processes > 1 else total
        self._let_rest(pieces)
        # Reading the two is the step's one wait for the device.
        total, norm = torch.stack([total.float(), self.optimizer.clip(self.stage.clip).float()]).tolist()
        self.loss = total / supervised
        if not math.isfinite(self.loss) or not math.isfinite(norm):
            ids = [i for b in batches for i in b.ids]
            raise Diverged(
                f"stage {self.stage.name}, step {self.step + 1}: the loss is {self.loss}, the gradient's norm {norm}; "
                f"samples {', '.join(ids[:8])}{' …' if len(ids) > 8 else ''}. Lower the learning rate, or look at them "
                f"with `opticnerve data show`"
            )
        factor = schedule(self.step, self.visits.steps, warmup=self.stage.warmup, kind=self.stage.schedule)
        self.optimizer.move(factor)
        self.step += 1
        self.tokens += int(tokens)
        self.samples += int(samples)
        return {
            "step": self.step, "loss": self.loss, "tokens": int(tokens), "supervised_tokens": int(supervised),
            "samples": int(samples), "grad_norm": norm,
            "learning_rate": {part: rate * factor for part, rate in self.frozen.rates.items()},
            **_fill(batches),
            **({"metrics": dict(self.objective.metrics)} if self.objective.metrics else {}),
        }  # fmt: skip

    def _backward(self, batches: list[Any], supervised: int) -> torch.Tensor:
        """Gradients of the mean loss over all micro-batches of all processes; this process's loss sum."""
        accelerator, total = self.accelerator, torch.zeros((), device=self.accelerator.device)
        if self.objective.whole_step:
            alone = self.optimizer.collect if accelerator.num_processes == 1 else None
            return total + self.objective.backward(batches, 1.0 / supervised, after_each=alone)
        for k, batch in enumerate(batches):
            last = k == len(batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.wrapped):
                loss, _ = self.wrapped(batch)
                # Summed over processes by all-reduce, which averages: hence the number of processes.
                (loss * (accelerator.num_processes / supervised)).backward()
            if accelerator.num_processes == 1:  # all-reduce wants the gradients where autograd left them
                self.optimizer.collect()
            total += loss.detach()
        return total

    def _let_rest(self, pieces: list[int]) -> None:
        """A tower that saw nothing in this step, on any process, does not move: as on one process, where its weights
        have no gradient. (Beside others a process gives them the gradient zero, which Adam's momentum would follow.)"""
        if self.accelerator.num_processes == 1 or not is_docked_model(self.dock.model):
            return
        for count, modality in zip(pieces, MEDIA_INPUT, strict=True):
            tower = getattr(self.dock.model, modality, None)
            if not count and tower is not None:
                for parameter in tower.parameters():
                    parameter.grad = None

    # -- saving ---------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """A checkpoint that this stage continues from, exactly."""
        moving = moving_buffers(self.dock.model, self.optimizer.master_tensors())
        model_buffers = {n: self.dock.model.get_buffer(n).detach().cpu() for n in moving}
        state = {
            "optimizer": self.optimizer.state_dict(), "rng": checkpoint.rng_state(), "buffers": model_buffers,
            "samples": self.samples, "tokens": self.tokens, "elapsed": self.elapsed, "loss": self.loss,
        }  # fmt: skip
        if not self.accelerator.is_main_process:
            return self.folder
        return checkpoint.save(self.folder, self.step, state)

    def restore(self) -> bool:
        """Go back to the newest whole checkpoint; False where there is none."""
        state = checkpoint.newest(self.folder, warn=self.console.print if self.console is not None else print)
        if state is None:
            return False
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["buffers"].items():
            self.dock.model.get_buffer(name).copy_(value)
        checkpoint.set_rng_state(state["rng"])
        self.step, self.samples, self.tokens = state["step"], state["samples"], state["tokens"]
        self.elapsed, self.loss = state["elapsed"], state["loss"]
        return True

    # -- around it ------------------------------------------------------------------------------------------------

    def _ask_to_stop(self) -> None:
        self.stop = True

    def _progress(self, steps: int) -> Progress:
        quiet = self.console is None or not self.accelerator.is_main_process
        return Progress(self.stage.name, steps, start=self.step, console=None if quiet else self.console)


def _fill(batches: list[Any]) -> dict[str, float]:
    """The share of this process's positions that hold a token and no padding."""
    places = sum(getattr(b, "places", 0) for b in batches)
    return {"fill": round(sum(b.tokens for b in batches) / places, 4)} if places else {}


def _media_counts(batches: list[Any]) -> list[int]:
    """Pieces of media in a step's batches, by modality."""
    given = [getattr(b, "media", {}) for b in batches]
    counts = []
    for modality, key in MEDIA_INPUT.items():
        seen = [len(media[f"{modality}_features"].mask_BN) for media in given if f"{modality}_features" in media]
        counts.append(sum(seen) + sum(len(media[key]) for media in given if key in media))
    return counts


@contextlib.contextmanager
def _signals(ask: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the loop to save and leave after its step; a second one is Python's own."""
    before: dict[Any, Any] = {}

    def handle(number: int, frame: Any) -> None:
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


def _keep_lines(metrics: Path, steps: int) -> None:
    """Drop lines of steps that a resumed run does again."""
    if metrics.exists():
        lines = metrics.read_text().splitlines()[:steps]
        metrics.write_text("".join(line + "\n" for line in lines))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
