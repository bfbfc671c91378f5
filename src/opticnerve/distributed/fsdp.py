"""FSDP2: weights, gradients and optimizer spread over the processes, and brought together again at a stage's end.

Each layer of the language model, each block of an encoder that trains, and all the rest is a group of torch's
`fully_shard` (Zhao et al. 2023, PyTorch FSDP; its second version keeps each parameter a `DTensor`). A group is whole
while it computes. A frozen encoder stays whole on every process: one whose share of a batch holds no picture does not
run it, and the others would wait for its shards.

A twin of the model is sharded, module by module the same, and the model's own parameters are empty meanwhile: at the
end they take what the twin has learned, and nothing of FSDP is left in them.

A language model that was read onto shards (`language.sharded`) stays so: the twin trains its very shards.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from opticnerve.common.shards import whole
from opticnerve.language.layers import decoder_layers
from opticnerve.models.freeze import Frozen
from opticnerve.objectives.base import Objective

if TYPE_CHECKING:
    from opticnerve.models.family import FamilyModel
    from opticnerve.models.vlm.tower import Tower


class Twin:
    """An objective over a twin of its model, some of whose weights are spread over the processes.

    Args:
        objective: the objective over the whole model, which is on its device already.
        own: tensors of the whole model, by `id`, whose place the twin's own take; all others are shared.

    Attributes:
        objective, model: the twins. shares: the weights that are spread, by name.
    """

    def __init__(self, objective: Objective, own: dict[int, Any]) -> None:
        gc.collect()  # the twin of the stage before hangs in circles with its hooks, and its shards and moments with it
        self.whole, self._objective = objective.model, objective
        tensors = {id(t): t for t in [*self.whole.parameters(), *self.whole.buffers()]}
        self.objective = copy.deepcopy(objective, tensors | own)
        self.model = self.objective.model
        self.shares: dict[str, Any] = {}

    def trained(self, frozen: Frozen) -> Frozen:
        """What trains, by the same names, in shares."""
        groups = {part: {n: self.shares[n] for n in group} for part, group in frozen.groups.items()}
        return replace(frozen, groups=groups)

    def empty_whole(self) -> None:
        """What is spread shall not be in memory twice."""
        own = dict(self.whole.named_parameters())
        for name, share in self.shares.items():
            if own[name] is not share:
                own[name].data = own[name].data.new_empty(0)


class Sharded(Twin):
    """FSDP2's.

    Args:
        reshard: free a layer's weights again after its forward pass (as ZeRO-3); False keeps them until the backward
            pass has been through (as ZeRO-2).

    Attributes:
        stays: the language model was read onto shards over `mesh`, and stays in them.
    """

    def __init__(self, objective: Objective, *, world: int, device: torch.device, reshard: bool = True) -> None:
        shards = {n: p for n, p in _parameters(objective.model) if isinstance(p, DTensor)}
        super().__init__(objective, {id(p): _without_values(p) for p in shards.values()})
        mesh = next((p.device_mesh for p in shards.values()), None) or init_device_mesh(device.type, (world,))
        kept_whole = {p for tower in self.model.towers.values() for p in _frozen_encoder(tower)}
        for module in layers(self.model):
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard, ignored_params=kept_whole)
        fully_shard(self.objective, mesh=mesh, reshard_after_forward=False, ignored_params=kept_whole)
        for name, shard in shards.items():  # as `load_state_dict(assign=True)`, which forgets which of them are tied
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, shard)
        self.mesh, self.stays = mesh, bool(shards)
        self.shares = {n: p for n, p in self.model.named_parameters() if isinstance(p, DTensor)}
        self.empty_whole()

    @torch.no_grad()
    def bring_together(self) -> tuple[Any, Any]:
        """Give the whole model, on every process, the weights and buffers that the twin has come to; returns it, and
        its objective: the twin's, where the language model stays in shards and nothing but FSDP can run it."""
        own = dict(self.whole.named_parameters())
        for name, share in self.shares.items():
            if own[name] is not share:
                own[name].data = whole(share)
                if not self.stays:
                    share.to_local().untyped_storage().resize_(0)  # not twice in memory
        for name, buffer in self.model.named_buffers():
            if (mine := self.whole.get_buffer(name)) is not buffer:
                mine.copy_(buffer)
        return self.whole, self.objective if self.stays else self._objective


def _parameters(model: FamilyModel) -> Iterator[tuple[str, nn.Parameter]]:
    """All by name, those that are tied by each of theirs."""
    modules: nn.Module = cast(nn.Module, model)
    return modules.named_parameters(remove_duplicate=False)


def _without_values(shard: DTensor) -> nn.Parameter:
    """What `fully_shard` plans for: a parameter of the same shape that takes no memory."""
    return nn.Parameter(torch.empty(shard.shape, dtype=shard.dtype, device="meta"), requires_grad=shard.requires_grad)


def layers(model: FamilyModel) -> list[nn.Module]:
    """What is whole only while it computes, from the inside out."""
    blocks = [
        block
        for tower in model.towers.values()
        for block in tower.encoder.blocks()
        if any(p.requires_grad for p in block.parameters())
    ]
    return [*blocks, *decoder_layers(model.language_model)[1]]


def _frozen_encoder(tower: Tower) -> list[nn.Parameter]:
    """An encoder's weights, if none of them trains."""
    weights = list(tower.encoder.parameters())
    return [] if any(p.requires_grad for p in weights) else weights
