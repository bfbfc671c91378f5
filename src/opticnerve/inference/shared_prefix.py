"""Several questions about one picture: the picture, and all that stands before the first different word, is read once.

A prompt's keys and values do not depend on what comes after it, so those of the common beginning are computed for one
row and repeated for all (Pope et al. 2022, Efficiently Scaling Transformer Inference, section 3.3, share the cache of
one prompt likewise between its samples). A row of the batch then is its group's beginning, padding, and its own words.

Which conversations share is settled before anything is read (`share`). They do not where

- a connector reads the question with the picture, or layers look at the picture beside the text (cross-attention): the
  picture's part is not in the cache, or differs with the words;
- the cache is more than keys and values of every token: linear attention and recurrent states take padding in the
  middle amiss, sliding windows shorter than the conversation would count it;
- the tokenizer is a slow one: it cannot say where the media end.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from opticnerve.common.private_names import CACHE, is_stateful
from opticnerve.data.encode.tokenize import encode
from opticnerve.fusion.base import Fusion
from opticnerve.types import AudioPart, Conversation, ImagePart

if TYPE_CHECKING:
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.processing import OpticNerveProcessor


@dataclass(frozen=True)
class SharedRow:
    """A question of a group: `number` in the caller's list, its `group`, its tokens, how many of them all rows of the
    group begin with, and the group's first prompt, which shows the media."""

    number: int
    group: int
    ids: list[int]
    shared: int
    first: Conversation


def share(
    model: OpticNerveForConditionalGeneration,
    processor: OpticNerveProcessor,
    prompts: Sequence[Conversation],
    max_new_tokens: int,
) -> list[SharedRow]:
    """The prompts that share their beginning with another, groups together, like lengths beside each other."""
    by_media: dict[Hashable, list[int]] = {}
    for number, prompt in enumerate(prompts):
        if prompt.pieces:
            by_media.setdefault(tuple(_media_key(p) for p in prompt.pieces), []).append(number)
    candidates = [numbers for numbers in by_media.values() if len(numbers) > 1]
    if not candidates or not _in_cache(model, processor) or not processor.tokenizer.is_fast:
        return []
    groups: list[list[SharedRow]] = []
    for numbers in candidates:
        encoded = {i: encode(prompts[i], processor, learn=False) for i in numbers}
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, sample in encoded.items():
            if len(sample.input_ids) > sample.media_end:
                alike.setdefault(tuple(sample.input_ids[: sample.media_end]), []).append(i)
        for members in alike.values():
            rows = {i: encoded[i].input_ids for i in members}
            if len(rows) > 1 and _plain_cache(model, max(map(len, rows.values())) + max_new_tokens):
                shared, first = _common(list(rows.values())), prompts[members[0]]
                groups.append([SharedRow(i, len(groups), ids, shared, first) for i, ids in rows.items()])
    groups.sort(key=lambda rows: max(len(r.ids) for r in rows))
    return [row for rows in groups for row in sorted(rows, key=lambda r: len(r.ids))]


def read_shared(
    model: OpticNerveForConditionalGeneration,
    pad: int,
    rows: Sequence[SharedRow],
    inputs_of: Callable[[list[Conversation]], dict[str, Any]],
) -> tuple[dict[str, Tensor], Any]:
    """The batch of these rows as `decode` takes it, and the cache with each group's beginning read."""
    firsts = list({row.group: row for row in rows}.values())
    places = {row.group: i for i, row in enumerate(firsts)}
    given = inputs_of([row.first for row in firsts])
    media = {k: v for k, v in given.items() if k not in ("input_ids", "attention_mask")}
    cache = read_heads(model, [r.ids[: r.shared] for r in firsts], media, [places[r.group] for r in rows], pad=pad)
    inputs = layout([r.ids[: r.shared] for r in rows], [r.ids[r.shared :] for r in rows], pad=pad)
    return {k: v.to(model.device) for k, v in inputs.items()}, cache


@torch.inference_mode()
def read_heads(
    model: OpticNerveForConditionalGeneration,
    heads: Sequence[list[int]],
    media: dict[str, Any],
    places: Sequence[int],
    *,
    pad: int,
) -> Any:
    """A cache of rows, row i of which holds `heads[places[i]]`; each head is read once, its media in `media`."""
    inputs = {k: v.to(model.device) for k, v in layout(heads, [[]] * len(heads), pad=pad).items()}
    mask_GS = inputs["attention_mask"]
    cache = model(
        input_ids=inputs["input_ids"], attention_mask=None if bool(mask_GS.all()) else mask_GS,
        position_ids=(mask_GS.cumsum(1) - 1).clamp_min(0), use_cache=True, logits_to_keep=1, **media,
    )[CACHE]  # fmt: skip
    cache.batch_select_indices(torch.tensor(places, device=model.device))
    return cache


def layout(heads: Sequence[list[int]], tails: Sequence[list[int]], *, pad: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` (B, L): padding, head, padding, tail; heads end in one column, as do tails."""
    before, behind = max(map(len, heads)), max(map(len, tails))
    pairs = list(zip(heads, tails, strict=True))
    ids = [[pad] * (before - len(h)) + h + [pad] * (behind - len(t)) + t for h, t in pairs]
    mask = [[0] * (before - len(h)) + [1] * len(h) + [0] * (behind - len(t)) + [1] * len(t) for h, t in pairs]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def looks_beside(model: OpticNerveForConditionalGeneration) -> bool:
    """Whether layers look at the picture beside the text (cross-attention), so that the cache does not hold it all."""
    return any(type(tower.fusion).see is not Fusion.see for tower in model.towers.values())


def _in_cache(model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor) -> bool:
    """Whether all that a picture tells is keys and values of the text, the same for every question."""
    return not (looks_beside(model) or processor.reads_questions)


def _plain_cache(model: OpticNerveForConditionalGeneration, length: int) -> bool:
    """Whether a cache of so many tokens would hold the keys and values of each of them, in every layer."""
    language = model.language_model
    if is_stateful(language):
        return False
    layers = DynamicCache(config=language.config.get_text_config(decoder=True)).layers
    return all(
        type(x) is DynamicLayer or (type(x) is DynamicSlidingWindowLayer and x.sliding_window >= length) for x in layers
    )


def _media_key(piece: ImagePart | AudioPart) -> Hashable:
    """Equal for the same file, the same bytes, or the same object."""
    source = piece.source
    known = source if isinstance(source, Path | bytes) else id(source)
    return type(piece), type(source), known


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all rows begin with, leaving at least one of each to ask the language model about."""
    most = min(len(r) for r in rows) - 1
    count = 0
    while count < most and all(r[count] == rows[0][count] for r in rows[1:]):
        count += 1
    return count
