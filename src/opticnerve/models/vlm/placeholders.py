"""Placeholders: the ids that the processor writes where media stand. They are valid wherever an id is, and no answer.

An id may lie in a row of the language model's table that no word has (Qwen's tables are padded, Llama 3's have reserved
rows) or beyond the table. The table is the language model's own and stays as it is, so that its logits do, too; what
lies beyond it is known here alone: `PlaceholderEmbedding` looks it up, `barred` makes the logits as wide.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import is_tracing, torch_compilable_check

from opticnerve.common.on_host import on_host


class PlaceholderEmbedding(nn.Embedding):
    """A view of a language model's embedding table that knows placeholders beyond it, too; it holds no weights.

    Args:
        table: the embedding module of the language model, whose weights these are.
        ids: of the placeholders; each is looked up as a vector of its own, no word's, which media take the place of.
    """

    def __init__(self, table: nn.Module, ids: Iterable[int]) -> None:
        nn.Module.__init__(self)  # an nn.Embedding's own constructor would draw weights
        own: Any = vars(table)
        # The same dictionaries: weights that are replaced, moved or cast there are so here.
        self._parameters, self._buffers, self._modules = own["_parameters"], own["_buffers"], own["_modules"]
        self.__dict__["table"] = table  # no child: it would be listed twice
        self.ids = tuple(ids)

    def __getattr__(self, name: str) -> Any:
        """What else there is to be asked of a table: `num_embeddings`, `padding_idx`, …"""
        own = self.__dict__
        return getattr(own["table"], name) if "table" in own else super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:
        """(…) ids → (…, D)."""
        table: nn.Module = self.__dict__["table"]
        beyond = {i: input == i for i in self.ids}
        known = input
        for is_it in beyond.values():
            known = known.masked_fill(is_it, 0)
        out: Tensor = table(known)
        for number, is_it in enumerate(beyond.values(), 1):
            out = out.masked_fill(is_it.unsqueeze(-1), float(number))
        return out


def embedding_of(table: nn.Module, ids: Iterable[int]) -> nn.Module:
    """`table` itself where all placeholders lie in it, else a view that knows them."""
    rows = int(table.num_embeddings)  # type: ignore[arg-type]
    beyond = [i for i in ids if i >= rows]
    return PlaceholderEmbedding(table, beyond) if beyond else table


def looks_like(number: int, embedding: nn.Module, embeds_BLD: Tensor) -> Tensor:
    """(B, L) bool: where embeddings are those of a placeholder."""
    one_D: Tensor = embedding(torch.full((), number, device=embeds_BLD.device))
    return (embeds_BLD == one_D.to(embeds_BLD.dtype)).all(-1)


def shown(place_BL: Tensor) -> bool:
    """Whether there are placeholders. A graph that is made without media is one for text: it holds that there are none,
    as a check of its own."""
    if is_tracing():
        torch_compilable_check(~place_BL.any(), "placeholders in the text, and a graph that was made without media")
        return False
    return bool(on_host(place_BL).any())


def barred(logits: Tensor, ids: Iterable[int]) -> Tensor:
    """Logits (…, V) in which no placeholder can be the answer, wide enough for the ids beyond the table.

    Their logits are the least number of the dtype. Those of words are the same bits. Logits that nobody will
    differentiate are written to in place.
    """
    ids = list(ids)
    least = torch.finfo(logits.dtype).min
    width = logits.shape[-1]
    within = [i for i in ids if i < width]
    if within and (
        torch.compiler.is_compiling()
        or logits.requires_grad
        or logits.is_inference() != torch.is_inference_mode_enabled()
    ):
        logits = logits.clone()
    for i in within:
        logits[..., i] = least
    wanted = max([width, *(i + 1 for i in ids)])
    return logits if wanted == width else F.pad(logits, (0, wanted - width), value=least)


def sayable(logits: Tensor) -> Tensor:
    """The columns of logits (…, V) that `barred` left: what can be compared with another engine's."""
    return (logits > torch.finfo(logits.dtype).min).flatten(0, -2).any(0).nonzero().squeeze(1)
