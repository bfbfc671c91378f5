"""What every objective promises: a batch in, a sum and a count out, so that any split of a batch adds up exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn


class Objective(nn.Module, ABC):
    """What a stage minimises.

    A batch is whatever the collator gives: it moves with `.to(device)`, and says `supervised` (what the loss is a mean
    over), `tokens`, `samples` and `ids`. `metrics` holds named figures of the last forward pass, for the log.

    `whole_step`: the batch of a step cannot be split, for each of its samples is compared with all others. Such an
    objective does its own backward pass over the micro-batches and processes of a step (`backward`).
    """

    whole_step: ClassVar[bool] = False

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.metrics: dict[str, float] = {}

    @abstractmethod
    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The float32 loss sum, and the number that it is a sum over."""

    def backward(self, batches: Sequence[Any], scale: float, *, after_each: Callable[[], None] | None = None) -> Tensor:
        """Gradients of `scale` × the loss of all micro-batches together, summed over processes; returns the loss
        sum of this process.

        Only where `whole_step`. `after_each` is called whenever gradients have been added.
        """
        raise NotImplementedError(f"{type(self).__name__} is computed micro-batch by micro-batch")

    @classmethod
    def collator(cls, processor: Any, stage: Any, seed: int) -> Callable[[Sequence[Sequence[Any]]], Any] | None:
        """What makes a batch of each row's conversations; None for rows of tokens with labels (`data.collate`)."""
        return None
