"""A batch that rows enter and leave while it runs: the model's side of serving.

Scheduling by the token instead of by the batch (Yu et al. 2022, Orca): a new prompt is read alone, as it would be if
nobody else were there, and then its keys and values are laid beside those of the rows that are already answering,
padded on the left. Rows that have ended are left out with the next change. A row's own tokens, positions and mask do
not know of the others, so its logits are those it has alone, up to the rounding of products of another shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from opticnerve.common.private_names import CACHE, is_stateful, repeat_rows
from opticnerve.fusion.base import Fusion
from opticnerve.inference.decoding import forward_rows
from opticnerve.inference.generate import Answerer
from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
from opticnerve.models.vlm.placeholders import barred
from opticnerve.models.vlm.prompt import keep, kept
from opticnerve.ops.fused_decode import FusedDecoder, reserve

ROOM = 128  # tokens for which a layer's buffers grow at a time
_GROWING_ROPE = ("dynamic", "longrope")
# A window's layer keeps all keys here, as the others do: what it may look at is in its mask, whoever stands beside it.
_KEPT_WHOLE = (DynamicLayer, DynamicSlidingWindowLayer)


def why_alone(model: OpticNerveForConditionalGeneration) -> str | None:
    """Why this model's prompts are answered one at a time; None where they share a batch."""
    for fusion in (type(tower.fusion) for tower in model.towers.values()):
        if fusion.see is not Fusion.see and fusion.beside is Fusion.beside:
            return f"{fusion.__name__} does not say how what its layers see lies side by side (`Fusion.beside`)"
    language = model.language_model
    if is_stateful(language):
        return "its language model carries a recurrent state"
    config = language.config.get_text_config(decoder=True)
    if any(type(layer) not in _KEPT_WHOLE for layer in DynamicCache(config=config).layers):
        return "its cache is more than keys and values (linear attention)"
    if getattr(config, "attention_chunk_size", None):
        return "its attention goes by chunks of the text"
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):  # one for all layers, or one for each kind
        if isinstance(rope, dict) and rope.get("rope_type") in _GROWING_ROPE:
            return f"its rotary embedding ({rope['rope_type']}) changes with the longest text of the batch"
    return None


class RunningBatch:
    """Rows that are being answered.

    Args:
        answerer: the model, its processor and its fused form.

    `len(batch)`: rows, those that have ended and were not yet left out among them.
    """

    def __init__(self, answerer: Answerer) -> None:
        self.answerer, self.model = answerer, answerer.model
        self.joins = why_alone(self.model) is None
        self.device: torch.device = self.model.device
        self.clear()

    def clear(self) -> None:
        """Leave all rows out."""
        self.cache: Any = None
        self.mask_BT = torch.zeros(0, 0, dtype=torch.bool, device=self.device)
        self.next_B = torch.zeros(0, dtype=torch.long, device=self.device)  # the position of the next token
        self.media_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.next_B)

    @torch.inference_mode()
    def read(self, inputs: dict[str, Any], rows: int, *, each: bool = False) -> tuple[Tensor, _Read]:
        """Read one prompt: the logits behind it (rows, V), and what `join` takes.

        `inputs`: as the processor makes them for one prompt. `rows`: how many answers are wanted. `each`: keep the
        logits behind each of the prompt's tokens, too.
        """
        inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        inputs.pop("attention_mask", None)
        ids_BL = inputs.pop("input_ids")
        if not self.joins and rows > 1:
            ids_BL, inputs = repeat_rows(self.model, rows, ids_BL, inputs)
        media_B = self.model.rows_with_media(ids_BL)
        position_BL = torch.arange(ids_BL.shape[1], device=self.device).expand_as(ids_BL)
        behind = 0 if each else 1
        out = forward_rows(
            self.model, media_B, input_ids=ids_BL, position_ids=position_BL, logits_to_keep=behind, **inputs,
            **{CACHE: DynamicCache() if self.joins else None},
        )  # fmt: skip
        logits_BV, cache = out.logits[:, -1], out[CACHE]
        if self.joins and rows > 1:
            index = torch.zeros(rows, dtype=torch.long, device=self.device)
            cache.batch_select_indices(index)
            self._see(cache, [(kept(cache), index)])
            logits_BV = logits_BV.expand(rows, -1)
            media_B = None if media_B is None else media_B.expand(rows)
        return logits_BV, _Read(cache, ids_BL.shape[1], rows, media_B, out.logits[0] if each else None)

    @torch.inference_mode()
    def join(self, read: _Read, chosen: Sequence[int]) -> None:
        """The `chosen` rows of a prompt just read go on beside the others."""
        if not self.joins:
            assert len(self) == 0
            self.cache, self.media_B = read.cache, read.media_B
            self.mask_BT = torch.ones(read.rows, read.length, dtype=torch.bool, device=self.device)
            self.next_B = torch.full((read.rows,), read.length, device=self.device)
            return
        index = torch.tensor(chosen, device=self.device)
        before, length = self.mask_BT.shape[1] if len(self) else 0, read.length
        width = max(before, length)
        new_BT = self.mask_BT.new_zeros(len(chosen), width)
        new_BT[:, width - length :] = True
        for number, layer in enumerate(read.cache.layers):
            old = self.cache.layers[number] if len(self) else None
            layer.keys = _beside(None if old is None else old.keys, layer.keys[index], width)
            layer.values = _beside(None if old is None else old.values, layer.values[index], width)
        rows = torch.arange(len(self), device=self.device)
        self._see(read.cache, [(kept(self.cache), rows), (kept(read.cache), index)])
        self.cache = read.cache
        reserve(self.cache, ROOM)
        self.mask_BT = torch.cat([_wider(self.mask_BT, width), new_BT]) if len(self) else new_BT
        if read.media_B is not None:
            new_B = read.media_B[index]
            self.media_B = torch.cat([self.media_B, new_B]) if self.media_B is not None and len(self) else new_B
        self.next_B = torch.cat([self.next_B, self.next_B.new_full((len(chosen),), length)])

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on. Columns that pad all of them are cut away."""
        if not rows:
            self.clear()
            return
        if not self.joins:
            return
        index = torch.tensor(rows, device=self.device)
        mask_BT = self.mask_BT[index]
        first = int(mask_BT.any(0).int().argmax())
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[index, :, first:], layer.values[index, :, first:]
        self._see(self.cache, [(kept(self.cache), index)])
        self.mask_BT, self.next_B = mask_BT[:, first:], self.next_B[index]
        self.media_B = None if self.media_B is None else self.media_B[index]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], live: Sequence[bool]) -> Tensor:
        """Logits (B, V) behind one more token of each row. Rows that are not `live` are carried along."""
        tokens_B = torch.tensor(tokens, device=self.device)
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(self), 1)], 1)
        mask_BT = None if bool(self.mask_BT.all()) else self.mask_BT
        fused = self._fused()
        if fused is not None:
            fused.prepare(len(self))
            cos_B1d, sin_B1d = fused.tables(self.next_B, 1)
            mask_B11T = None if mask_BT is None else mask_BT[:, None, None]
            logits_BV = fused.step(tokens_B, cos_B1d[:, 0], sin_B1d[:, 0], self.cache.layers, mask_B11T)
            logits_BV = barred(logits_BV, self.model.placeholder_ids)
        else:
            out = forward_rows(
                self.model, self.media_B, input_ids=tokens_B[:, None], position_ids=self.next_B[:, None],
                attention_mask=None if mask_BT is None else mask_BT.long(), **{CACHE: self.cache},
            )  # fmt: skip
            self.cache, logits_BV = out[CACHE], out.logits[:, -1]
        # A row that has ended stands still: its positions must not run out of the model's table.
        self.next_B = self.next_B + torch.tensor(live, device=self.device)
        return logits_BV

    def _see(self, cache: Any, parts: Sequence[tuple[dict[str, Any], Tensor]]) -> None:
        """A cache goes on with what these rows see, where layers look at media beside the text."""
        seen = {}
        for modality, tower in self.model.towers.items():
            own = [(known.get(modality), index_B) for known, index_B in parts if len(index_B)]
            if any(known is not None for known, _ in own):
                seen[modality] = tower.fusion.beside(own)
        keep(cache, seen)

    def _fused(self) -> FusedDecoder | None:
        if not self.joins or self.media_B is not None or self.model.device.type != "cpu":
            return None
        return self.answerer.fused()


class _Read(NamedTuple):
    """A prompt that has been read and not yet joined: its cache, tokens, rows, which of these hold media, and the
    logits behind its tokens, where they are wanted."""

    cache: Any
    length: int
    rows: int
    media_B: Tensor | None
    logits_LV: Tensor | None = None


def _wider(x: Tensor, width: int) -> Tensor:
    """(B, T) padded on the left with False."""
    return torch.cat([x.new_zeros(len(x), width - x.shape[1]), x], 1)


def _beside(old_BHTd: Tensor | None, new_BHTd: Tensor, width: int) -> Tensor:
    """Both batches' keys or values as one, padded on the left to `width` tokens."""
    both = [x for x in (old_BHTd, new_BHTd) if x is not None]
    out_BHTd = new_BHTd.new_zeros(sum(map(len, both)), new_BHTd.shape[1], width, new_BHTd.shape[3])
    row = 0
    for x in both:
        out_BHTd[row : row + len(x), :, width - x.shape[2] :] = x
        row += len(x)
    return out_BHTd
