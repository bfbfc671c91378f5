"""What a checkpoint of a stage holds, and how a stage goes on from one exactly.

Weights (float32 masters), optimizer, step (which is the place in the schedule and, with the seed, in the data and the
packs), every process's random numbers, the buffers that move, and what has been counted so far.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError

from opticnerve.common import atomic
from opticnerve.common.version import __version__
from opticnerve.distributed.collectives import gather_objects, on_main
from opticnerve.train import checkpoint, data_fingerprint
from opticnerve.train.metrics import METRICS, steps_in
from opticnerve.types import OpticNerveError

if TYPE_CHECKING:
    from opticnerve.train.loop import Run


def save(run: Run) -> Path:
    """A checkpoint that the stage continues from, exactly; every process takes part, one of them writes."""
    state = {
        "optimizer": run.optimizer.state_dict(keep=run.accelerator.is_main_process),
        "buffers": {n: run.dock.model.get_buffer(n).detach().cpu() for n in run.moving},
        "rng": gather_objects(run.accelerator, checkpoint.rng_state(run.accelerator.device)),
        "data": run.data,
        "versions": versions(),
        "samples": run.samples, "tokens": run.tokens, "elapsed": run.elapsed, "loss": run.loss,
        "left_out": run.divergence.left_out, "visits": run.sampler.state_dict(),
    }  # fmt: skip

    def write() -> Path:
        if run.log is not None:
            run.log.sync()  # a checkpoint is never ahead of the lines
        return checkpoint.save(run.folder, run.step, state, keep=run.stage.keep_checkpoints)

    return on_main(run.accelerator, write)


def restore(run: Run) -> bool:
    """Go back to the newest whole checkpoint; False where there never was one.

    Raises:
        OpticNerveError: there are checkpoints and none can be used, or the data are others.
    """
    state = checkpoint.newest(run.folder, warn=run.emit, most=steps_in(run.folder / METRICS))
    if state is None:
        return False
    data_fingerprint.check(state["data"], run.data, run.folder)
    run.optimizer.load_state_dict(state["optimizer"])
    for name, value in state["buffers"].items():
        run.dock.model.get_buffer(name).copy_(value)
    run.sampler.load_state_dict(state["visits"])
    _take_up(run, state["rng"])
    run.step, run.samples, run.tokens = state["step"], state["samples"], state["tokens"]
    run.elapsed, run.loss = state["elapsed"], state["loss"]
    run.divergence.left_out = list(state["left_out"])
    if (now := versions()) != state["versions"]:
        run.emit(f"the checkpoint was written by {state['versions']}, this is {now}: not the same to the last bit")
    return True


def save_model(run: Run) -> None:
    """What the stage has come to, in its folder."""
    try:
        run.dock.save(run.folder, run.trained)
    except (OSError, SafetensorError) as e:
        free = atomic.format_bytes(shutil.disk_usage(run.folder).free)
        raise OpticNerveError(
            f"the model of stage {run.stage.name} could not be written to {run.folder}: {e}; {free} are free there. "
            f"Free some space, and resume"
        ) from e


def versions() -> dict[str, str]:
    """Of what a curve depends on, to the last bit."""
    return {
        "opticnerve": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__,
    }  # fmt: skip


def _take_up(run: Run, rng: list[dict[str, Any]]) -> None:
    """Each process its own generators; on another number of processes the first alone has any to go on with, and the
    others begin theirs as in a fresh run."""
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    if len(rng) != world:
        run.emit(f"the checkpoint is of {len(rng)} processes, these are {world}: dropout draws other numbers")
    if rank == 0 or len(rng) == world:
        checkpoint.set_rng_state(rng[rank], run.accelerator.device)
