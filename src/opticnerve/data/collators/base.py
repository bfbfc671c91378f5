"""What batches share: they move to a device, and one that holds samples by themselves counts them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

from torch import Tensor

from opticnerve.ops.varlen import Segments
from opticnerve.types import Features

_B = TypeVar("_B", bound="Moving")


class Moving:
    """A dataclass whose tensors, `Features` and `Segments` go to a device together; all else that it holds stays."""

    def to(self: _B, device: Any) -> _B:
        """A batch of the same, on that device."""
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})  # type: ignore[type-var,arg-type]


class SampleBatch(Moving):
    """A batch of samples, each by itself: the loss is a mean over them."""

    ids: list[str]

    @property
    def supervised(self) -> int:
        """What the loss is a mean over."""
        return len(self.ids)

    @property
    def samples(self) -> int:
        return len(self.ids)


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Segments):
        return value.to(device)
    if isinstance(value, Features):
        return Features(_moved(value.tokens_BND, device), _moved(value.mask_BN, device))
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    return value
