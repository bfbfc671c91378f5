"""Tensors that lie in shards over the processes: torch's `DTensor` as FSDP2 has it, the first dimension cut into pieces
of one size, one for each process; the last ones may be shorter, or empty."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def to_device(module: nn.Module, device: torch.device) -> None:
    """As `module.to(device)`, which would copy each tensor that lies in shards: these are where they belong."""
    if not any(isinstance(p, DTensor) for p in module.parameters()):
        module.to(device)
        return
    for inner in module.modules():
        for parameter in inner.parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(device)
        for name, buffer in inner.named_buffers(recurse=False):
            setattr(inner, name, buffer.to(device))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may lie in shards; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def state_dict_with(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, `model.state_dict()` has these in the place of its own of the same names."""

    def put(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, int]) -> None:
        state.update(tensors)

    handle = model.register_state_dict_post_hook(put)
    try:
        yield
    finally:
        handle.remove()


def gather(tensors: Mapping[str, Tensor], names: Iterable[str], *, keep: bool) -> dict[str, Tensor]:
    """Those of the named tensors that lie in shards, whole and in main memory; every process must call it.

    One at a time passes through the device. Processes that say `keep=False` get nothing.
    """
    found = {}
    for name in sorted(set(names)):
        if isinstance(tensor := tensors.get(name), DTensor):
            all_of_it = whole(tensor.detach())
            if keep:
                found[name] = all_of_it.cpu()
    return found


def own_rows(tensor: DTensor) -> slice:
    """Which rows of all of it this process holds."""
    rows, mesh = tensor.shape[0], tensor.device_mesh
    each = -(-rows // mesh.size())
    first = min(each * mesh.get_local_rank(), rows)
    return slice(first, min(first + each, rows))


def as_shard(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor, if `like` lies in shards; else the tensor. No more than the share goes to
    `like`'s device."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    mine = tensor[own_rows(like)].to(like.device, copy=True)
    return DTensor.from_local(
        mine, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def copy_into(target: Tensor, source: Tensor) -> None:
    """Have a tensor that may lie in shards be what the whole one, `source`, is: of one that is mapped from a file each
    process reads its own rows alone."""
    if isinstance(target, DTensor):
        target.to_local().copy_(source[own_rows(target)])
    else:
        target.copy_(source)


@torch.no_grad()
def rows_of(table: Tensor, start: int, stop: int) -> Tensor:
    """Rows of a table that may lie in shards, on every process; every process must call it."""
    if not isinstance(table, DTensor):
        return table[start:stop]
    mine, local = own_rows(table), table.to_local()
    found = local.new_zeros(stop - start, *table.shape[1:])
    first, last = max(start, mine.start), min(stop, mine.stop)
    if first < last:
        found[first - start : last - start] = local[first - mine.start : last - mine.start]
    dist.all_reduce(found, group=table.device_mesh.get_group())  # the others' rows are zeros
    return found
