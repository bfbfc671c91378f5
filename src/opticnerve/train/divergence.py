"""A step whose loss or gradient is no number: which samples it saw, and whether the run goes on without it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opticnerve.common import atomic
from opticnerve.data.media.open import open_image
from opticnerve.recipe import Stage
from opticnerve.train.sampler import StageSampler
from opticnerve.train.state import TrainState
from opticnerve.types import Conversation, OpticNerveError

SAMPLES = "diverged.jsonl"
MOST_IN_A_ROW = 10
"""So many steps left out one after another are no accident: the run stops."""


class Diverged(OpticNerveError):
    """The loss stopped being a number."""

    kind = "diverged"


class Divergence:
    """What happens to the steps of a stage that are no numbers, as its `on_divergence` says.

    Args:
        folder: of the stage. state: which steps were left out so far; this adds to it.
        model: whose `moving` buffers (a batch norm's statistics) a step that is left out must not leave changed.
    """

    def __init__(self, stage: Stage, folder: Path, state: TrainState, model: nn.Module) -> None:
        self.stage, self.folder, self.state = stage, folder, state
        self._model, self._moving = model, state.moving if stage.on_divergence == "skip" else ()
        self._before: dict[str, torch.Tensor] = {}

    def before_step(self) -> None:
        """Remember what computing a step moves by itself."""
        self._before = {n: self._model.get_buffer(n).clone() for n in self._moving}

    def handle(self, loss: float, norm: float, sampler: StageSampler, *, keep: bool) -> str:
        """The step in progress diverged: its samples are kept (by the process that is told to), and it is left out.

        Returns: the words for metrics.jsonl.

        Raises:
            Diverged: the recipe says stop, or too many were left out in a row.
        """
        why, step = f"the loss is {loss}, the gradient's norm {norm}", self.state.step + 1
        samples = samples_of(sampler, self.state.step)
        file = self.folder / SAMPLES
        if keep:
            _keep(file, step, why, samples)
        ids = ", ".join(c.id or c.where for c in samples[:8]) + (" …" if len(samples) > 8 else "")
        what = (
            f"stage {self.stage.name}, step {step}: {why}; samples {ids}. They are kept: `opticnerve data show {file} "
            f"--media / --model {self.folder.parent.parent / 'recipe.yaml'} --index 0`."
        )
        if self.stage.on_divergence == "stop":
            raise Diverged(f"{what} Lower the learning rate, mend the samples, or write on_divergence: skip")
        left_out = self.state.left_out
        left_out.append(step)
        if left_out[-MOST_IN_A_ROW:] == list(range(step - MOST_IN_A_ROW + 1, step + 1)):
            raise Diverged(f"{what} That makes {MOST_IN_A_ROW} steps left out in a row: lower the learning rates")
        with torch.no_grad():
            for name, value in self._before.items():
                self._model.get_buffer(name).copy_(value)
        return why


def samples_of(sampler: StageSampler, step: int) -> list[Conversation]:
    """The conversations of a step (from 0), of all processes."""
    rows = range(step * sampler.stage.batch_size, (step + 1) * sampler.stage.batch_size)
    seen = rows if sampler.plan is None else [index for row in rows for index in sampler.plan[row]]
    return [c for index in seen for c in sampler.drawn(index)]


def _keep(file: Path, step: int, why: str, samples: Sequence[Conversation]) -> None:
    """The file with a step's samples in it, and those of no later step: a resumed run does these again."""
    media = file.with_suffix("")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    for number, c in enumerate(samples):
        messages = c.to_chat()
        for message in messages:
            for part in message["content"]:
                for kind in ("image", "audio"):
                    if kind in part and not isinstance(part[kind], str):
                        part[kind] = _file_of(part[kind], kind, media / f"{step}-{number}")
                    elif kind in part:
                        part[kind] = str(Path(part[kind]).absolute())
        kept.append(
            json.dumps({"id": c.id, "messages": messages, "step": step, "why": why, "where": c.where}, default=str)
        )
    atomic.write(file, "".join(line + "\n" for line in kept))


def _file_of(source: Any, kind: str, stem: Path) -> str:
    """A medium that lies in no file of its own, written to one."""
    stem.parent.mkdir(exist_ok=True)
    taken = len(list(stem.parent.glob(f"{stem.name}-*")))
    path = stem.with_name(f"{stem.name}-{taken}" + (".png" if kind == "image" else ""))
    if kind == "image":
        open_image(source, where=str(stem)).save(path)
    else:
        atomic.write(path, source if isinstance(source, bytes) else source.tobytes())
    return str(path.absolute())
