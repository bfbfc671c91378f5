"""What every objective promises: a batch in, a sum and a count out, so that any split of a batch adds up exactly.
And how one batch is made of what several processes hold, gradients included."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from opticnerve.common.on_host import sent
from opticnerve.types import AutogradContext, MediaProcessor, OpticNerveError

if TYPE_CHECKING:
    from opticnerve.ops.sequence import SequenceGroup
    from opticnerve.recipe import Stage


class Objective(nn.Module, ABC):
    """What a stage minimises.

    A batch is whatever the collator gives: it moves with `.to(device)`, and says `supervised` (what the loss is a mean
    over), `tokens`, `samples` and `ids`. `metrics` holds named figures of the last forward pass, for the log:
    scalars that still lie on the device, or numbers.

    `by_source`: where the loop gives one, a running float32 sum of losses for each data entry (S,), to which
    `add_sources` adds. `unit`: what the loss is a mean over.

    `processes`: those that share each sequence with this one, where there are such.

    `whole_step`: the batch of a step cannot be split, for each of its samples is compared with all others. Such an
    objective does its own backward pass over the micro-batches and processes of a step (`backward`).
    """

    rate: float = 0.0
    whole_step: ClassVar[bool] = False
    unit: ClassVar[Literal["tokens", "samples"]] = "samples"
    in_batch: ClassVar[bool] = False
    """Whether the samples of a batch are compared with each other, on all processes."""
    ddp_only: ClassVar[bool] = False
    """Whether it calls parts of the model by other ways than their `forward`, which sharded weights want."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.metrics: dict[str, Tensor | float] = {}
        self.by_source: Tensor | None = None
        self.processes: SequenceGroup | None = None

    def add_sources(self, sources_N: Tensor | None, losses_N: Tensor) -> None:
        """Add losses to the sums of the data entries that they are of, where the loop wants to know."""
        if self.by_source is not None and sources_N is not None:
            self.by_source.index_add_(0, sources_N, losses_N.detach().float())

    @abstractmethod
    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The float32 loss sum, and the number that it is a sum over."""

    def backward(self, batches: Sequence[Any], scale: float, *, after_each: Callable[[], None] | None = None) -> Tensor:
        """Gradients of `scale` × the loss of all micro-batches together, summed over processes; returns the loss
        sum of this process.

        Only where `whole_step`. `after_each` is called whenever gradients have been added.
        """
        raise NotImplementedError(f"{type(self).__name__} is computed micro-batch by micro-batch")

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """What the objective has beside the model: it trains at `rate`, is kept in checkpoints, and thrown away when
        the stage ends."""
        return {n: p for n, p in self.named_parameters() if not n.startswith("model.")}

    @classmethod
    def collator(
        cls, processor: MediaProcessor, stage: Stage, seed: int
    ) -> Callable[[Sequence[Sequence[Any]]], Any] | None:
        """What makes a batch of each row's conversations; None for rows of tokens with labels (`Collator`)."""
        return None


# -- several processes -------------------------------------------------------------------------------------------------


def processes() -> tuple[int, int]:
    """(this process, how many there are)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(x: Tensor) -> Tensor:
    """(B, …) here → (processes × B, …), in the order of the processes; every process calls it with the same shape.

    Gradients flow back to the process that a row came from and are summed over the processes that used it: the sum of
    all processes' losses has the gradient that one process with the whole batch would find.
    """
    if processes()[1] == 1:
        return x
    return _Gather.apply(x) if x.is_floating_point() else _all_gather(x)


def gather_padded(ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids and their masks of all processes, padded on the right (0, False) to the longest row anywhere.

    Raises:
        OpticNerveError: the processes hold batches of different sizes (on all of them, so that none is left waiting).
    """
    if processes()[1] == 1:
        return ids_BL, mask_BL
    shapes = _all_gather(torch.tensor([ids_BL.shape], device=ids_BL.device))
    counts, lengths = shapes[:, 0].tolist(), shapes[:, 1].tolist()
    if len(set(counts)) > 1:
        raise OpticNerveError(
            f"the processes hold {counts} samples; in-batch negatives want the same number on each", kind="wrong-shape"
        )
    more = (0, max(lengths) - ids_BL.shape[1])
    return _all_gather(F.pad(ids_BL, more)), _all_gather(F.pad(mask_BL.long(), more)).bool()


def shared_uniform(count: int, device: torch.device) -> Tensor:
    """(count,) float64 in [0, 1), the same on all processes: the first one draws, from torch's generator."""
    # On the CPU: its generator is the one that checkpoints keep.
    drawn = sent(torch.rand(count).double(), device)
    if processes()[1] > 1:
        dist.broadcast(drawn, src=0)
    return drawn


def _all_gather(x: Tensor) -> Tensor:
    found = [torch.empty_like(x) for _ in range(processes()[1])]
    dist.all_gather(found, x.contiguous())
    return torch.cat(found)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: AutogradContext, x: Tensor) -> Tensor:
        ctx.count = x.shape[0]
        return _all_gather(x)

    @staticmethod
    def backward(ctx: AutogradContext, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous()
        dist.all_reduce(total)
        rank = processes()[0]
        return total[rank * ctx.count : (rank + 1) * ctx.count]
