"""The part of a checkpoint that lies in shards (torch.distributed.checkpoint): each process writes its own rows of
masters and moments, and reads those that it needs, however many processes wrote them.

    checkpoint-00000012/
        state.pt, sha256.json   as of any checkpoint; of what lies in shards, the place in the state alone
        shards/*.safetensors    some files for each process, and in each the offsets of its rows

No tensor is whole while it is written. A process that holds no shards reads whole ones.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, empty

from opticnerve.common import atomic
from opticnerve.distributed.collectives import on_main
from opticnerve.types import OpticNerveError

SHARDS = "shards"
_PLACES = "in_shards"  # of the state: name in the files → keys on the way to the tensor
_FILE_BYTES = 1 << 30  # of whole tensors; a file is put together in main memory before it is written


def take_out(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, DTensor]]:
    """A state without its tensors that lie in shards, and these by name; the state says where they belong."""
    found = dict(_in_shards(state, ()))
    if not found:
        return dict(state), {}
    names = {"/".join(map(str, keys)): keys for keys in found}
    rest = _without(state, frozenset(found), ())
    return {**rest, _PLACES: {n: list(keys) for n, keys in names.items()}}, {n: found[k] for n, k in names.items()}


def put_back(state: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The opposite of `take_out`."""
    for name, keys in state.pop(_PLACES).items():
        inner = state
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = tensors[name]
    return state


def names(state: Mapping[str, Any]) -> list[str]:
    """Of the tensors that were taken out of a state."""
    return list(state.get(_PLACES, {}))


def write(tensors: Mapping[str, DTensor], folder: Path, accelerator: Accelerator, *, remedy: str) -> Path:
    """Write tensors that lie in shards; every process must call it. Returns where, on all: a folder that is left over
    (`atomic.clear_left_overs`) until a checkpoint takes it in.

    Raises:
        DiskFull: it does not fit. OpticNerveError: it cannot be written. On all processes.
    """
    size = sum(t.numel() * t.itemsize for t in tensors.values())

    def begin() -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        place = atomic.partial_of(folder / SHARDS)
        shutil.rmtree(place, ignore_errors=True)
        with atomic.room_for("a checkpoint", size, folder, remedy=remedy):
            place.mkdir()
        return place

    place = on_main(accelerator, begin)
    writer = dcp.HuggingFaceStorageWriter(str(place), _files(tensors), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer)
    except dcp.CheckpointException as e:  # all processes get what went wrong on any
        if accelerator.is_main_process:
            shutil.rmtree(place, ignore_errors=True)
        found = {rank: error[0] for rank, error in e.failures.items()}
        said = "; ".join(f"process {rank}: {error}" for rank, error in found.items())
        words = f"could not write a checkpoint to {folder}: {said}; {remedy}"
        if any(isinstance(error, OSError) and error.errno in atomic.FULL for error in found.values()):
            raise atomic.DiskFull(words) from e
        raise OpticNerveError(words, kind="no-permission") from e
    return place


def read(folder: Path, names: list[str], mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """The tensors of a folder, each process its rows, on the mesh's device; without a mesh whole, in main memory.

    Raises:
        OpticNerveError: some are missing or torn.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    known = reader.read_metadata().state_dict_metadata
    if missing := [n for n in names if not isinstance(known.get(n), dcp.TensorStorageMetadata)]:
        raise OpticNerveError(f"{folder} lacks {', '.join(missing[:4])}; bring it back from a copy", kind="damaged")
    found: dict[str, Tensor] = {}
    for name in names:
        one = known[name]
        assert isinstance(one, dcp.TensorStorageMetadata)
        if mesh is None:
            found[name] = torch.empty(one.size, dtype=one.properties.dtype)
        else:
            found[name] = empty(one.size, dtype=one.properties.dtype, device_mesh=mesh, placements=[Shard(0)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)  # a process alone is what is meant
        dcp.load(found, storage_reader=reader, no_dist=mesh is None)
    return found


def _in_shards(value: object, keys: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], DTensor]]:
    if isinstance(value, DTensor):
        yield keys, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _in_shards(inner, (*keys, key))


def _without(value: Any, gone: frozenset[tuple[str | int, ...]], keys: tuple[str | int, ...]) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {k: _without(v, gone, (*keys, k)) for k, v in value.items() if (*keys, k) not in gone}


def _files(tensors: Mapping[str, DTensor]) -> dict[str, int]:
    """The number of the file, from 1, that each tensor's rows go to."""
    found, file, size = {}, 1, 0
    for name, tensor in tensors.items():
        mine = tensor.numel() * tensor.itemsize
        if size and size + mine > _FILE_BYTES:
            file, size = file + 1, 0
        found[name], size = file, size + mine
    return found
