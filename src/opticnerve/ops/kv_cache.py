"""A cache of keys and values with room to grow, so that a new token writes one row instead of copying all before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class ReservedLayer(DynamicLayer):
    """transformers' `DynamicLayer` with `room` for so many more tokens; the cache of one layer of a decoder.

    `keys` and `values`, (B, H, L, d), are views of buffers that reach further. Whoever replaces them (`crop`,
    `batch_select_indices`, …) is noticed, and the next token makes new buffers. `torch.cat`, which transformers' own
    layer uses, copies the whole past for each token.
    """

    def __init__(self, layer: DynamicLayer, room: int) -> None:
        super().__init__()
        self.__dict__.update(vars(layer))
        self.room = room
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._shown: Tensor | None = None

    def append(self, key_BHd: Tensor, value_BHd: Tensor) -> tuple[Tensor, Tensor]:
        """One more token of each row; the keys and values of all so far."""
        length = self.get_seq_length()
        keys, values = self._reserved(length, 1)
        keys.select(2, length).copy_(key_BHd)
        values.select(2, length).copy_(value_BHd)
        self.keys = self._shown = keys.narrow(2, 0, length + 1)
        self.values = values.narrow(2, 0, length + 1)
        return self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        length, new = self.get_seq_length(), key_states.shape[2]
        keys, values = self._reserved(length, new)
        keys.narrow(2, length, new).copy_(key_states)
        values.narrow(2, length, new).copy_(value_states)
        self.keys = self._shown = keys.narrow(2, 0, length + new)
        self.values = values.narrow(2, 0, length + new)
        return self.keys, self.values

    def _reserved(self, length: int, new: int) -> tuple[Tensor, Tensor]:
        known = self._buffers
        if known is None or self._shown is not self.keys or known[0].shape[2] < length + new:
            keys, values = ((x, x.new_empty(*x.shape[:2], length + new + self.room, x.shape[3])) for x in self.pair())
            for old, buffer in (keys, values):
                buffer.narrow(2, 0, length).copy_(old)
            self._buffers = known = (keys[1], values[1])
        return known

    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, L, d) so far; a layer has room made for it only after it has read a prompt."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values


def reserve(cache: Any, room: int) -> bool:
    """Let each plain layer of a `DynamicCache` hold so many more tokens; True if that was all of its layers.

    Layers of other kinds (sliding windows, linear attention) know best how to keep themselves and stay.
    """
    if type(cache) is not DynamicCache:
        return False
    cache.layers = [ReservedLayer(x, room) if type(x) is DynamicLayer and x.is_initialized else x for x in cache.layers]
    return all(type(layer) is ReservedLayer for layer in cache.layers)
