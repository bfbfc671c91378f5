"""Where a model looks while it answers: for each word of its answer a map over the picture, by one or more methods.

Attention says where information may have come from, not what the answer hangs on (Jain & Wallace 2019, Attention is not
Explanation). So an occlusion map, which asks the model itself, always stands beside the method that was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opticnerve.fusion.base import Splice
from opticnerve.fusion.gated_cross_attention import GatedCrossAttention
from opticnerve.interpret import attention_maps
from opticnerve.interpret.occlusion import occlusion
from opticnerve.interpret.teacher_forcing import TeacherForced, Word, check
from opticnerve.types import Conversation, OpticNerveError

# What each method needs: soft tokens in the text ("splice"), layers of cross-attention, or neither.
METHODS = {
    "attention": "splice",
    "rollout": "splice",
    "relevance": "splice",
    "cross_attention": "cross_attention",
    "gradient": "any",
    "occlusion": "any",
}
_BY_LAYER = ("attention", "cross_attention")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Map:
    """One method's maps, one for each word: `grid_WHH` (words, rows, columns).

    Occlusion is in nats of log-probability and may be negative; all else is non-negative and sums to 1 on the picture.
    `on_picture`: by word, the share of the row that falls on the picture at all, where there is such a row.
    """

    method: str
    grid_WHH: NDArray[np.float32]
    note: str
    on_picture: list[float] | None = None

    def peak(self, word: int) -> tuple[float, float]:
        """The middle of the highest cell, as shares of the picture's width and height from the top left."""
        rows, columns = self.grid_WHH.shape[1:]
        row, column = divmod(int(self.grid_WHH[word].argmax()), columns)
        return (column + 0.5) / columns, (row + 0.5) / rows


@dataclass(frozen=True)
class Attribution:
    """An answer, its words with their log-probabilities, and the maps. `box`: see `seen_box`."""

    answer: str
    words: list[Word]
    log_p: list[float]
    maps: list[Map]
    box: Box


def default_method(model: Any) -> str:
    """Relevance; the cross-attention itself for models that have one; for tokens without a place, `gradient`."""
    if soft_side(model) is None:
        return "gradient"
    return "cross_attention" if isinstance(model.image.fusion, GatedCrossAttention) else "relevance"


def attribute(
    model: Any,
    processor: Any,
    conversation: Conversation,
    *,
    methods: Sequence[str] | None = None,
    layer: int | None = None,
    head: int | None = None,
    grid: int = 6,
    patch: int = 2,
    max_new_tokens: int = 24,
) -> Attribution:
    """Ask, and explain the greedy answer.

    Args:
        model, processor: as from `load_model` or `dock`; float32 weights give the steadiest differences.
        conversation: one question about one picture.
        methods: from METHODS; by default `default_method`. Occlusion is added as the last if it is not among them.
        layer, head: one of the attention's, from 0; for `attention` and `cross_attention`. By default the mean over
            all heads of all layers.
        grid, patch: of the occlusion, see there.

    Raises:
        OpticNerveError: a method that this model's parts do not allow, with the reason and one that they do.
    """
    check(model, conversation)
    chosen = list(dict.fromkeys(methods or [default_method(model)]))
    for method in chosen:
        check_method(model, method)
    if (layer, head) != (None, None) and not set(chosen) & set(_BY_LAYER):
        raise OpticNerveError(
            f"layer and head choose among attention weights; {', '.join(chosen)} runs through all of them: "
            f"leave them out, or take --method {' or '.join(_BY_LAYER)}"
        )
    forced = TeacherForced(model, processor, conversation, max_new_tokens=max_new_tokens)
    maps = [_map(forced, m, layer, head, grid, patch) for m in [*(c for c in chosen if c != "occlusion"), "occlusion"]]
    log_p_T = forced.log_p(forced.pixels_CHW[None])[0]
    sums = [float(log_p_T[list(w.tokens)].sum()) for w in forced.words]
    size = picture_size(conversation)
    return Attribution(forced.text, forced.words, sums, maps, seen_box(processor.image_processor, *size))


def _map(forced: TeacherForced, method: str, layer: int | None, head: int | None, grid: int, patch: int) -> Map:
    if method == "occlusion":
        drop_THW = occlusion(forced.log_p, forced.pixels_CHW, grid=grid, patch=patch)
        note = f"drop in log-probability (nats); squares of {patch} × {patch} on a grid of {grid} × {grid}"
        return Map(method, _words(drop_THW, forced.words, torch.sum), note)
    run: dict[str, Callable[[], Tensor]] = {
        "attention": lambda: attention_maps.attention(forced, layer, head),
        "rollout": lambda: attention_maps.attention_rollout(forced),
        "relevance": lambda: attention_maps.relevance(forced),
        "cross_attention": lambda: attention_maps.cross_attention(forced, layer, head),
        "gradient": lambda: attention_maps.gradient(forced),
    }
    weight_TV = run[method]().cpu()
    side = isqrt(weight_TV.shape[1])
    by_word_WHH = _words(weight_TV.unflatten(1, (side, side)), forced.words, torch.mean)
    total_W11 = by_word_WHH.sum((1, 2), keepdims=True)
    # Only of the rows of attention is the rest of the row known to be about something else: the text.
    shares = total_W11.ravel().tolist() if method in ("attention", "rollout") else None
    how = _CHOICE.get(method) or f"{_which('layer', layer)}, {_which('head', head)}"
    note = f"{how}; {side} × {side} tokens"
    flat_WHH = np.full_like(by_word_WHH, 1 / side**2)  # nothing on the picture at all: nowhere more than elsewhere
    return Map(method, np.divide(by_word_WHH, total_W11, out=flat_WHH, where=total_W11 > 0), note, shares)


_CHOICE = {
    "rollout": "all layers multiplied, mean of heads",
    "relevance": "all layers, heads weighted by gradient",
    "gradient": "|gradient · token| of the encoder's tokens",
}


def _which(name: str, number: int | None) -> str:
    return f"mean of all {name}s" if number is None else f"{name} {number}"


def _words(weight_THW: Tensor, words: Sequence[Word], merge: Callable[..., Tensor]) -> NDArray[np.float32]:
    """Maps of tokens to maps of words: log-probabilities of tokens add up, weights are averaged."""
    merged = [merge(weight_THW[list(w.tokens)].float(), 0) for w in words]
    found: NDArray[np.float32] = torch.stack(merged).cpu().numpy()
    return found


# -- what a model allows, and where a token lies ----------------------------------------------------------------------


def soft_side(model: Any) -> int | None:
    """The side of the map that the soft tokens of a picture make; None if they make none."""
    connector = model.image.connector
    side = isqrt(connector.num_tokens)
    return side if connector.keeps_grid and side**2 == connector.num_tokens else None


def check_method(model: Any, method: str) -> None:
    """Refuse what a model's parts do not allow."""
    if method not in METHODS:
        raise OpticNerveError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    tower, needs = model.image, METHODS[method]
    if method == "gradient":
        count = tower.encoder.num_tokens
        if isqrt(count) ** 2 != count:
            raise OpticNerveError(
                f"the encoder gives {count} tokens, which make no square map of the picture (class tokens among "
                "them?); --method occlusion needs no map"
            )
    if needs == "any":
        return
    if needs == "splice" and not isinstance(tower.fusion, Splice):
        raise OpticNerveError(
            f"{method} reads the language model's attention to soft tokens in the text, and with "
            f"{type(tower.fusion).__name__} there are none in it; take --method cross_attention, gradient or occlusion"
        )
    if needs == "cross_attention" and not isinstance(tower.fusion, GatedCrossAttention):
        raise OpticNerveError(
            f"this model has no layers of cross-attention (its fusion is {type(tower.fusion).__name__}); "
            "take --method relevance, attention, rollout, gradient or occlusion"
        )
    if soft_side(model) is None:
        connector = tower.connector
        why = (
            f"its {connector.num_tokens} soft tokens make no square"
            if connector.keeps_grid
            else "each of its soft tokens gathers from the whole picture"
        )
        raise OpticNerveError(
            f"{method} gives a weight to each soft token, and those of {type(connector).__name__} have no place in the "
            f"picture: {why}; take --method occlusion, or gradient (on the encoder's tokens)"
        )


def picture_size(conversation: Conversation) -> tuple[int, int]:
    """Width and height of the one picture."""
    from opticnerve.data.media.open import open_image

    size: tuple[int, int] = open_image(conversation.images[0].source).size
    return size


def seen_box(image_processor: Any, width: int, height: int) -> Box:
    """Left, top, right, bottom of the part of a picture that the vision encoder's square input shows, in the picture's
    pixels.

    The middle where the processor crops, more than the picture where it pads, the picture itself where it squashes.
    """
    if getattr(image_processor, "do_pad", False):
        side = float(max(width, height))
    elif getattr(image_processor, "do_center_crop", False):
        shortest = _entry(image_processor.size, "shortest_edge")
        crop = _entry(image_processor.crop_size, "height") or 0
        side = min(width, height) * (crop / shortest if shortest and crop else 1)
    else:
        return 0.0, 0.0, float(width), float(height)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def _entry(size: Any, name: str) -> float | None:
    found = size.get(name) if isinstance(size, dict) else getattr(size, name, None)
    return None if found is None else float(found)
