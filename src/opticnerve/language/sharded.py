"""A language model whose weights are read onto shards: each process opens the same files and reads its rows of each
tensor. Nothing is whole anywhere, neither on a device nor in main memory.

transformers reads them so (`from_pretrained(distributed_config=…)`), onto a model that it wraps by FSDP2 for itself.
Its parameters, `DTensor`s, move into a plain model here, which knows nothing of FSDP: `distributed.fsdp` wraps a twin
of that for each stage, as for any other model.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.distributed import DistributedConfig

from opticnerve.language.composite import load_weights
from opticnerve.language.experts import expert_tensors
from opticnerve.language.layers import check_takes_embeddings, decoder_layers
from opticnerve.types import OpticNerveError

_processes: ContextVar[int] = ContextVar("processes that share a language model", default=1)


@contextmanager
def loading_onto_shards(processes: int) -> Iterator[None]:
    """Within it, language models are read onto shards, one for each of so many processes; on one they are whole."""
    before = _processes.set(processes)
    try:
        yield
    finally:
        _processes.reset(before)


def loads_onto_shards() -> bool:
    """Whether a language model that is loaded now is read onto shards."""
    return _processes.get() > 1


def check_not_sharded(name: str, config: PreTrainedConfig) -> None:
    """Refuse a checkpoint whose text model is taken out of it where it would have to be whole."""
    if loads_onto_shards():
        raise OpticNerveError(
            f"{name!r} ({config.model_type}) holds more than a language model, and its text model cannot be read onto "
            "shards; name a language model alone, or launch with recipes/launch/fsdp2.yaml",
            kind="unsupported",
        )


def load_sharded(folder: str, name: str, config: Any, dtype: torch.dtype) -> Any:
    """transformers' causal language model, its parameters in shards, its buffers whole; in `eval()`.

    Args:
        folder: where its weights are. name: as the user wrote it, for messages. config: its configuration.

    Raises:
        OpticNerveError: as `load_weights` and `check_takes_embeddings`.
    """
    planned, processes = _without_values(config, dtype), _processes.get()
    for count in {planned.get_parameter(n).shape[0] for n in expert_tensors(planned)}:
        # transformers stacks those of each process, and cannot stack none
        if -(-count // processes) * (processes - 1) >= count:
            raise OpticNerveError(
                f"the {count} experts of {name!r} do not go over {processes} processes: the last would have none; take "
                f"a number of processes that divides {count}",
                kind="mismatch",
            )
    path, _ = decoder_layers(planned)
    asked = DistributedConfig(fsdp_size=processes, fsdp_plan={f"{path}.*": "free_full_weight"})
    loaded = load_weights(AutoModelForCausalLM, folder, name, dtype, shared=asked)
    # By each of their names. (What a layer computes with is another tensor.)
    shards, buffers = (list(named(remove_duplicate=False)) for named in (loaded.named_parameters, loaded.named_buffers))
    check_takes_embeddings(loaded, name)
    del loaded.config.distributed_config
    model = _without_values(loaded.config, dtype)
    own = {id(p): _own_memory(p) for _, p in shards}
    for full_name, tensor in [*((n, own[id(p)]) for n, p in shards), *buffers]:
        owner, _, leaf = full_name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, tensor)
    if left := [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]:
        raise OpticNerveError(
            f"transformers left {', '.join(left[:4])} of {name!r} without values; load this language model whole, by "
            "recipes/launch/fsdp2.yaml",
            kind="unsupported",
        )
    model.generation_config = loaded.generation_config
    del loaded, shards
    gc.collect()  # FSDP's modules and their hooks hold each other, and maps of the files
    return model.eval()


def _without_values(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


@torch.no_grad()
def _own_memory(shard: DTensor) -> nn.Parameter:
    """On a CPU the rows that were read are a view of the mapped file, where the dtype is the file's."""
    if shard.device.type != "cpu":
        return cast(nn.Parameter, shard)
    copied = DTensor.from_local(
        shard.to_local().clone(), shard.device_mesh, shard.placements, run_check=False, shape=shard.shape,
        stride=shard.stride(),
    )  # fmt: skip
    return nn.Parameter(copied, requires_grad=shard.requires_grad)
