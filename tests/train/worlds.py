"""Worlds of processes over gloo, forked from one that has imported everything already: a world starts at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from opticnerve import recipe as recipes
from opticnerve.models.family import build
from opticnerve.train import checkpoint, throughput
from opticnerve.train.loop import Interrupted, run_stage

_CONTEXT = multiprocessing.get_context("forkserver")
# Names within site-packages alone: the fork server knows no other path (Python 3.11), and says nothing about it.
_CONTEXT.set_forkserver_preload(
    ["opticnerve.train.loop", "opticnerve.models.family", "transformers.models.llama.modeling_llama",
     "transformers.models.clip.modeling_clip", "transformers.models.clip.image_processing_clip", "torch.distributed.fsdp",
     "peft", "torch._dynamo"]
)  # fmt: skip
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@dataclass
class Ended:
    """How a process ended: its exit code (minus the signal that killed it), and all that it printed."""

    code: int | None
    printed: str


def world(
    processes: int, work: Callable[..., None], *args: Any, folder: Path, environment: dict[str, str] | None = None,
    within: float = 240.0, after_failure: float = 40.0,
) -> list[Ended]:  # fmt: skip
    """Run `work(*args)` in so many processes. Those that are left after `within` seconds, or `after_failure`
    seconds after one has failed, are killed: code None."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    logs = [folder / f"{time.monotonic_ns()}-{rank}.log" for rank in range(processes)]
    started = []
    for rank, log in enumerate(logs):
        ranks = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        } if processes > 1 else {}  # fmt: skip
        given = {**os.environ, "ACCELERATE_USE_CPU": "true", **ranks, **(environment or {})}
        started.append(_CONTEXT.Process(target=_live, args=(given, log, work, args)))
        started[-1].start()
    until = time.monotonic() + within
    while any(p.exitcode is None for p in started) and time.monotonic() < until:
        if any(p.exitcode for p in started):
            until = min(until, time.monotonic() + after_failure)
            after_failure = within
        started[0].join(0.05)
        time.sleep(0.05)
    codes = [p.exitcode for p in started]
    for process in started:
        if process.exitcode is None:
            process.kill()  # also where it is stopped
        process.join()
    return [Ended(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def _live(environment: dict[str, str], log: Path, work: Callable[..., None], args: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    throughput.usual_matmul_rate = lambda kind, dtype: 1e9  # type: ignore[assignment]  # measured in test_throughput.py
    work(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def torchrun(
    processes: int, command: list[str], folder: Path, hurt: str = "", environment: dict[str, str] | None = None
) -> None:
    """`torchrun -m opticnerve_launch COMMAND`: torch's agent, its processes forked like ours."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=f"{time.monotonic_ns()}", rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0", max_restarts=0, monitor_interval=0.1, start_method="forkserver",
    )  # fmt: skip
    given = {**os.environ, "ACCELERATE_USE_CPU": "true", **(environment or {})}
    elastic_launch(config, _command)(given, folder, command, hurt)


def _command(environment: dict[str, str], folder: Path, command: list[str], hurt: str) -> None:
    from opticnerve.cli.main import app

    if hurt:
        _hurt(hurt)

    def run() -> None:
        if code := app(command, standalone_mode=False):
            raise SystemExit(code)

    _live({**os.environ, **environment}, folder / f"{time.monotonic_ns()}-torchrun.log", run, ())


def train(recipe: dict[str, Any], out: Path, resume: bool = False, hurt: str = "") -> None:
    """The recipe's stages, as the command runs them. `hurt`: "RANK STEP SIGNAL", sent by a process to itself after the
    step, or "RANK STEP error", an error of its data before the step after it."""
    if hurt:
        _hurt(hurt)
    read = recipes.load(recipe)
    dock, trained = build(read), set[str]()
    for number, stage in enumerate(read.stages):
        folder = out / "stages" / f"{number}-{stage.name}"
        try:
            run_stage(dock, read, stage, folder, trained_before=trained, resume=resume)
        except Interrupted as e:
            print(e)
            return


def trained(processes: int, recipe: dict[str, Any], folder: Path, environment: dict[str, str] | None = None) -> Path:
    """The run of a recipe by so many processes, each of which ends well; in a new folder."""
    folder.mkdir()
    for ended in world(processes, train, recipe, folder / "run", folder=folder, environment=environment):
        assert ended.code == 0, ended.printed[-3000:]
    return folder / "run"


def two_are_one(recipe: dict[str, Any], folder: Path) -> None:
    """Two processes draw one process's curve."""
    one, two = (curve(trained(n, recipe, folder / str(n))) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def _hurt(hurt: str) -> None:
    rank, at, how = hurt.split()
    if rank != os.environ.get("RANK", "0"):
        return
    taken, step = 0, int(at)
    from opticnerve.data.encode.loader import TimedBatches

    before = TimedBatches.__next__

    def after(self: Any) -> Any:
        nonlocal taken
        if taken == step:
            if how == "error":
                from opticnerve.types import DataError

                raise DataError("captions.jsonl, line 3: the picture is torn")
            os.kill(os.getpid(), getattr(signal, how))
        taken += 1
        return before(self)

    TimedBatches.__next__ = after  # type: ignore[method-assign]


def curve(out: Path, number: int = 0) -> list[dict[str, Any]]:
    [stage] = (out / "stages").glob(f"{number}-*")
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def state(out: Path, step: int | None = None, number: int = 0) -> dict[str, Any]:
    """What a checkpoint holds: the newest one, or that of a step."""
    [stage] = (out / "stages").glob(f"{number}-*")
    found = checkpoint.newest(stage) if step is None else checkpoint.load(stage / f"checkpoint-{step:08d}")
    assert found is not None
    return found


def weights(out: Path, number: int = 0) -> dict[str, torch.Tensor]:
    [file] = (out / "stages").glob(f"{number}-*/*.safetensors")
    return load_file(file)
