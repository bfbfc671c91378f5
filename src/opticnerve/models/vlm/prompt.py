"""What a prompt becomes before the language model reads it: embeddings, and what its layers shall see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from opticnerve.common.private_names import CACHE
from opticnerve.language.lora import adapter_on
from opticnerve.models.vlm.tower import Tower

MEDIA_KEYS = (
    "pixel_values", "image_sizes", "image_pools", "input_features", "qformer_input_ids", "qformer_attention_mask"
)  # fmt: skip


@dataclass
class Prompt:
    """`embeds_BLD`: text and soft tokens as one row; `seen`: by modality, what `Fusion.see` gave; `soft`: by modality,
    the soft tokens (images, N, D); `rows_B`: the rows that hold media, None where nobody asks."""

    embeds_BLD: Tensor | None = None
    seen: dict[str, Any] = field(default_factory=dict)
    soft: dict[str, Tensor] = field(default_factory=dict)
    rows_B: Tensor | None = None


@contextmanager
def multimodal_context(language_model: nn.Module, fusions: dict[str, Any], prompt: Prompt) -> Iterator[None]:
    """Within it, a forward pass of the language model sees the prompt's pictures and hears its sounds."""
    with ExitStack() as stack:
        for modality, fusion in fusions.items():
            stack.enter_context(fusion.seeing(prompt.seen.get(modality)))
        stack.enter_context(adapter_on(language_model, prompt.rows_B))
        yield


# A cache of keys and values carries along what later tokens must still see.
_ON_CACHE = "_opticnerve_seen"


def keep(cache: Cache | None, seen: dict[str, Any]) -> None:
    """Write down what the tokens behind this prompt will see."""
    if cache is not None and any(s is not None for s in seen.values()):
        setattr(cache, _ON_CACHE, seen)


def kept(cache: Cache | None) -> dict[str, Any]:
    """What an earlier forward pass with this cache wrote down."""
    return dict(getattr(cache, _ON_CACHE, None) or {})


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Two names of one thing: transformers knows `cache` from 5.24 on."""
    if cache is not None and past_key_values is not None:
        raise ValueError("give one of cache and past_key_values")
    return past_key_values if cache is None else cache


def seen_of(out: Any, prompt: Prompt) -> dict[str, Any]:
    """What both outputs hold beside their first fields: of the language model's, and the soft tokens."""
    return {
        CACHE: out.get(CACHE), "hidden_states": out.get("hidden_states"), "attentions": out.get("attentions"),
        "image_hidden_states": prompt.soft.get("image"), "audio_hidden_states": prompt.soft.get("audio"),
    }  # fmt: skip


def repeat_media(
    media: dict[str, Tensor], places: dict[str, list[int]], towers: dict[str, Tower], times: int
) -> dict[str, Tensor]:
    """Several answers to one prompt: each row's media, which lie in one tensor, `times` over as one block, in order.

    Args:
        media: the model's inputs by name. places: by modality, how many placeholders each row holds.
    """
    done = {}
    for key, value in media.items():
        modality = "audio" if key == "input_features" else "image"
        tower = towers[modality]
        if tower.layout is None and "image_pools" not in media:
            counts = [n // tower.num_placeholders for n in places[modality]]
        else:
            counts = _images_of_rows(tower, media, places[modality])
            if key == "pixel_values" and tower.layout is not None:
                sizes = media["image_sizes"].tolist()
                pieces = [tower.layout.num_pieces(*size) for size in sizes]
                counts = [sum(pieces[a:b]) for a, b in pairwise(accumulate(counts, initial=0))]
        done[key] = torch.cat([row for row in torch.split(value, counts) for _ in range(times)])
    return done


def _images_of_rows(tower: Tower, media: dict[str, Tensor], places: list[int]) -> list[int]:
    """How many pictures each row shows, from their sizes, how they are pooled, and the rows' placeholders."""
    pools = media["image_pools"].tolist() if "image_pools" in media else None
    sizes = media["image_sizes"].tolist() if tower.layout is not None else [(0, 0)] * len(pools or ())
    one_each = tower.num_placeholders == 1
    of_each = zip(sizes, pools or [1] * len(sizes), strict=True)
    return _pieces_of_rows([1 if one_each else tower.tokens_of(size, pool) for size, pool in of_each], places)


def _pieces_of_rows(tokens: list[int], places: list[int]) -> list[int]:
    """How many pieces of media each row shows, from their placeholders and the rows'."""
    each, counts = iter(tokens), []
    for left in places:
        count = 0
        while left > 0:
            left -= next(each)
            count += 1
        counts.append(count)
    return counts


def repeat_pooled(
    known: dict[str, Any], places: dict[str, list[int]], towers: dict[str, Tower], times: int
) -> dict[str, Any]:
    """`repeat_media` for soft tokens that are computed already: `mm_encoder_outputs` by modality."""
    done = {}
    for modality, output in known.items():
        tower, pieces = towers[modality], [*output.pooler_output]
        one_each = tower.num_placeholders == 1
        counts = _pieces_of_rows([1 if one_each else len(p) for p in pieces], places[modality])
        rows = [pieces[a:b] for a, b in pairwise(accumulate(counts, initial=0))]
        repeated = [piece for row in rows for _ in range(times) for piece in row]
        whole = isinstance(output.pooler_output, Tensor)
        done[modality] = type(output)(pooler_output=torch.stack(repeated) if whole else repeated)
    return done
