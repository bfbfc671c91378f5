"""Several processes, one training: which engine, what they tell each other, and how they stop together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh

from opticnerve.distributed.heartbeat import Heartbeat, LostProcess
from opticnerve.ops.sequence import SequenceGroup
from opticnerve.types import OpticNerveError

Value = TypeVar("Value")
TIMEOUT = "OPTICNERVE_TIMEOUT"
_heartbeat: Heartbeat | None = None  # one for each process, whatever it trains


def engine(environment: Mapping[str, str] = os.environ) -> Literal["ddp", "fsdp2", "zero2", "zero3"]:
    """What shares the work between processes, by what `accelerate launch` says in the environment.

    Raises:
        OpticNerveError: an engine that the loop does not drive, or an option of one that it does not honour.
    """

    def on(name: str) -> bool:
        return environment.get(name, "false").lower() == "true"

    if on("ACCELERATE_USE_MEGATRON_LM"):
        raise OpticNerveError(
            "Megatron-LM is not driven here; launch with recipes/launch/ddp.yaml or fsdp2.yaml", kind="unsupported"
        )
    if sequence_parallel(environment) > 1 and on("ACCELERATE_USE_DEEPSPEED"):
        raise OpticNerveError(
            "parallelism_config_sp_size was not tried with DeepSpeed; launch with recipes/launch/fsdp2-sequence.yaml",
            kind="unsupported",
        )
    if on("ACCELERATE_USE_DEEPSPEED"):
        return _zero({k.removeprefix(_ZERO): v for k, v in environment.items() if k.startswith(_ZERO)})
    if not on("ACCELERATE_USE_FSDP"):
        return "ddp"
    if environment.get("FSDP_VERSION", "1") != "2":
        raise OpticNerveError(
            "FSDP's first version is not driven here; set fsdp_version: 2, as recipes/launch/fsdp2.yaml",
            kind="unsupported",
        )
    if on("FSDP_OFFLOAD_PARAMS"):
        raise OpticNerveError("fsdp_offload_params is not honoured here; set it to false", kind="unsupported")
    if on("FSDP_ACTIVATION_CHECKPOINTING"):
        raise OpticNerveError(
            "fsdp_activation_checkpointing: leave it out, and write gradient_checkpointing: true in the stage",
            kind="unsupported",
        )
    return "fsdp2"


def keeps_shards(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the model shall lie in shards from its load to its last checkpoint: accelerate's `fsdp_state_dict_type:
    SHARDED_STATE_DICT`, under FSDP2.

    Raises:
        OpticNerveError: another kind of such a file.
    """
    if engine(environment) != "fsdp2":
        return False
    kind = environment.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    if kind not in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        raise OpticNerveError(
            f"fsdp_state_dict_type: {kind} is not honoured here; write FULL_STATE_DICT or SHARDED_STATE_DICT",
            kind="unsupported",
        )
    return kind == "SHARDED_STATE_DICT"


def sequence_parallel(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes share a sequence, by accelerate's `parallelism_config`; 1 where none was asked for.

    Raises:
        OpticNerveError: another kind of parallelism; or numbers that do not fit the number of processes.
    """
    if environment.get(f"ACCELERATE_USE_{_PARALLELISM}", "false").lower() != "true":
        return 1
    names = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")
    replicas, shards, tensor, context, size = (
        int(environment.get(f"{_PARALLELISM}_{name.upper()}", "1")) for name in names
    )
    if context > 1:
        raise OpticNerveError(
            "parallelism_config_cp_size: torch's ring attention has no kernel for CPUs, and knows neither packed rows "
            "nor padding; write parallelism_config_sp_size, which shares sequences out by heads",
            kind="unsupported",
        )
    if tensor > 1 or (replicas > 1 and shards > 1):
        what = "tp_size" if tensor > 1 else "dp_replicate_size beside dp_shard_size"
        raise OpticNerveError(
            f"parallelism_config: {what} is not driven here; leave it at 1, and set sp_size alone", kind="unsupported"
        )
    world = int(environment.get("WORLD_SIZE", "1"))
    if world % size or replicas * shards not in (1, world // size):
        raise OpticNerveError(
            f"parallelism_config: {replicas * shards} × sp_size {size} do not make {world} processes; leave "
            "dp_replicate_size and dp_shard_size at 1, and let sp_size divide the number of processes",
            kind="mismatch",
        )
    return size


def sequence_group(accelerator: Accelerator) -> SequenceGroup | None:
    """The processes that share each sequence with this one: neighbours; None where each has its own."""
    size = sequence_parallel()
    if size == 1:
        return None
    shape = (accelerator.num_processes // size, size)
    mesh = init_device_mesh(accelerator.device.type, shape, mesh_dim_names=("data", "sequence"))
    return SequenceGroup(mesh.get_group("sequence"), size, mesh.get_local_rank("sequence"))


_PARALLELISM, _ZERO = "PARALLELISM_CONFIG", "ACCELERATE_DEEPSPEED_"


def _zero(options: Mapping[str, str]) -> Literal["zero2", "zero3"]:
    """The stage of DeepSpeed's ZeRO; its other options are refused."""
    if options.get("CONFIG_FILE", "none") != "none":
        raise OpticNerveError(
            "deepspeed_config_file is not honoured here: the recipe says what such a file would; launch with "
            "recipes/launch/deepspeed-zero2.yaml or deepspeed-zero3.yaml",
            kind="unsupported",
        )
    honoured = {"OFFLOAD_OPTIMIZER_DEVICE": "none", "OFFLOAD_PARAM_DEVICE": "none", "ZERO3_INIT": "false"}
    for option, value in honoured.items():
        if options.get(option, value).lower() != value:
            raise OpticNerveError(
                f"DeepSpeed's {option.lower()} is not honoured here; set it to {value}", kind="unsupported"
            )
    stage = options.get("ZERO_STAGE", "2")
    if stage not in ("2", "3"):
        raise OpticNerveError(f"DeepSpeed's zero_stage {stage} is not driven here; 2 and 3 are", kind="unsupported")
    return "zero2" if stage == "2" else "zero3"


@contextmanager
def without_engines() -> Iterator[None]:
    """Within it, accelerate does not see that DeepSpeed or a share of sequences was asked for: it would want to drive
    them itself, and knows the latter on accelerators alone."""
    names = ("ACCELERATE_USE_DEEPSPEED", f"ACCELERATE_USE_{_PARALLELISM}")
    asked = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(asked)


def timeout(environment: Mapping[str, str] = os.environ) -> timedelta:
    """How long a process waits for the others within one exchange: `$OPTICNERVE_TIMEOUT` seconds, 600 by default."""
    text, seconds = environment.get(TIMEOUT, "600"), 0.0
    with suppress(ValueError):
        seconds = float(text)
    if not 0 < seconds < 1e7:
        raise OpticNerveError(f"{TIMEOUT}={text}: give a number of seconds above 0", kind="out-of-range")
    return timedelta(seconds=seconds)


def gather_objects(accelerator: Accelerator, value: object) -> list[Any]:
    """Each process's `value`, in the order of the processes, on all of them; every process must call it.

    `value` is what `pickle` takes: tensors (on the CPU) and plain values. One process: `[value]`.
    """
    if accelerator.num_processes == 1:
        return [value]
    found: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(found, value)
    return found


def attempt(make: Callable[[], list[Value]]) -> tuple[list[Value], OpticNerveError | None]:
    """What `make` gives, or nothing and the error for users that it raised: `add_up` raises it on all processes."""
    try:
        return make(), None
    except OpticNerveError as e:
        return [], e


def add_up(accelerator: Accelerator, counts: list[int], error: OpticNerveError | None = None) -> list[int]:
    """Sums of `counts` over all processes.

    Raises:
        OpticNerveError: `error`, where one process or several have one: on all of them, so that all stand at the same
            step and can save it together.
    """
    if accelerator.num_processes == 1:
        if error is not None:
            raise error
        return counts
    summed = torch.tensor([*counts, int(error is not None)], device=accelerator.device)
    totals: list[int]
    *totals, failed = accelerator.reduce(summed).tolist()
    if failed:
        said = gather_objects(accelerator, None if error is None else str(error))
        if error is not None:
            raise error
        first = next(rank for rank, text in enumerate(said) if text is not None)
        raise OpticNerveError(f"process {first} of {accelerator.num_processes}: {said[first]}", kind="refused")
    return totals


def on_main(accelerator: Accelerator, work: Callable[[], Value]) -> Value:
    """What `work` gives on the main process, for all; the others wait, however long it takes, while that one lives.

    Raises:
        OpticNerveError: what `work` raised, on all processes.
    """
    if accelerator.num_processes == 1:
        return work()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except OpticNerveError as e:
            outcome[1] = e
    barrier(accelerator)
    dist.broadcast_object_list(outcome, src=0)
    value, error = outcome
    if error is not None:
        raise error
    return cast(Value, value)


def barrier(accelerator: Accelerator) -> None:
    """Wait until all processes are here: without a limit in time as long as all of them live.

    For what one process does alone and takes long over (an evaluation, its share of the pictures): one of torch's
    exchanges would time out.

    Raises:
        OpticNerveError: one of them has stopped; the message says which.
    """
    if (heartbeat := _start(accelerator)) is not None:
        heartbeat.barrier()


@contextmanager
def companions(accelerator: Accelerator, doing: str) -> Iterator[None]:
    """Within it, an error here ends the other processes with its message, and their absence ends this one with theirs.

    Raises:
        OpticNerveError: an exchange failed; the message names the process that is missing, and what it said.
    """
    heartbeat = _start(accelerator)
    if heartbeat is None:
        yield
        return
    heartbeat.doing = doing
    try:
        yield
    except Exception as e:
        if not _lost_others(e):
            heartbeat.tell(e)
            raise
        raise LostProcess(heartbeat.explain(e)) from e


def _start(accelerator: Accelerator) -> Heartbeat | None:
    global _heartbeat
    if accelerator.num_processes == 1:
        return None
    if _heartbeat is None:
        _heartbeat = Heartbeat(accelerator.process_index, accelerator.num_processes, timeout())
    return _heartbeat


def _lost_others(error: Exception) -> bool:
    """Whether an exchange between processes failed. Gloo says so in a RuntimeError that only its words tell apart."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
    by_words = isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    return isinstance(error, dist.DistError) or by_words
