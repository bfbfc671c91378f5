"""What a frozen text encoder made of a text, remembered: questions come again and again, about other pictures."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from opticnerve.common.private_names import times_written
from opticnerve.models.classifier.heads import Read
from opticnerve.types import Features

MOST = 4096
"""Texts that are remembered; the one not seen for longest goes first."""


class TextMemory:
    """Reads through a text encoder; while that stays as it is, each text only once.

    Nothing is remembered while the encoder trains or its dropout is at work, nor across a change of its weights, their
    precision, or their device. Not a module: what it remembers is no state of the model.
    """

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self._known: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self._weights: list[tuple[int, int]] = []

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Read:
        """Token ids and mask (B, L) → `Read`, padded on the right."""
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.encoder.parameters())
        if learns or any(m.training for m in self.encoder.modules()):
            self._known.clear()
            return _read(self.encoder, input_ids, attention_mask)
        weights = [_mark(p) for p in self.encoder.parameters()]
        if weights != self._weights:
            self._known.clear()
            self._weights = weights
        ids_BL, mask_BL = input_ids.cpu(), attention_mask.cpu().bool()
        keys = [ids[mask].numpy().tobytes() for ids, mask in zip(ids_BL, mask_BL, strict=True)]
        missing = {k: i for i, k in enumerate(keys) if k not in self._known}
        if missing:
            rows = list(missing.values())
            with torch.no_grad():
                read = _read(self.encoder, input_ids[rows], attention_mask[rows])
            for row, key in enumerate(missing):
                states_LD = read.states.tokens_BND[row, : int(read.states.mask_BN[row].sum())]
                # Copies: a view would keep all of its batch in memory.
                self._known[key] = states_LD.clone(), read.vector_BD[row].clone()
        found = [self._known[k] for k in keys]
        for key in keys:
            self._known.move_to_end(key)
        while len(self._known) > max(MOST, len(keys)):
            self._known.popitem(last=False)
        states_BLD = torch.nn.utils.rnn.pad_sequence([s for s, _ in found], batch_first=True)
        lengths_B1 = torch.tensor([[len(s)] for s, _ in found], device=states_BLD.device)
        real_BL = torch.arange(states_BLD.shape[1], device=states_BLD.device) < lengths_B1
        return Read(Features(states_BLD, real_BL), torch.stack([v for _, v in found]))


def _mark(weight: Tensor) -> tuple[int, int]:
    """Where a weight lies, and how often it has been written to there."""
    return weight.data_ptr(), times_written(weight)


def _read(encoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Read:
    return Read(*encoder.states_and_vector(input_ids, attention_mask))
