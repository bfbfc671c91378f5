"""Where a model looks while it answers: for each word of its answer a map over the picture, by one or more methods.

Attention says where information may have come from, not what the answer hangs on (Jain & Wallace 2019, Attention is not
Explanation). So an occlusion map, which asks the model itself, always stands beside the method that was chosen: a piece
of the picture is covered, and the answer becomes less likely (Zeiler & Fergus 2014, Visualizing and Understanding
Convolutional Networks, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opticnerve.data.media.open import open_image
from opticnerve.fusion.base import Splice
from opticnerve.fusion.gated_cross_attention import GatedCrossAttention
from opticnerve.interpret import attention_maps
from opticnerve.interpret.teacher_forcing import TeacherForced, Word, check
from opticnerve.types import Conversation, OpticNerveError

if TYPE_CHECKING:
    from opticnerve.models.vlm.modeling import OpticNerveForConditionalGeneration
    from opticnerve.models.vlm.processing import OpticNerveProcessor

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
_HOW = {
    "rollout": "all layers multiplied, mean of heads", "relevance": "all layers, heads weighted by gradient",
    "gradient": "|gradient · token| of the encoder's tokens",
}  # fmt: skip
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


def default_method(model: OpticNerveForConditionalGeneration) -> str:
    """Relevance; the cross-attention itself for models that have one; for tokens without a place, `gradient`."""
    if not has_places(model):
        return "gradient"
    return "cross_attention" if isinstance(model.image.fusion, GatedCrossAttention) else "relevance"


def attribute(
    model: OpticNerveForConditionalGeneration, processor: OpticNerveProcessor, conversation: Conversation, *,
    methods: Sequence[str] | None = None, layer: int | None = None, head: int | None = None, grid: int = 6,
    patch: int = 2, max_new_tokens: int = 24,
) -> Attribution:  # fmt: skip
    """Ask, and explain the greedy answer.

    Args:
        model, processor: as from `load_model` or `dock`; float32 weights give the steadiest differences.
        conversation: one question about one picture.
        methods: from METHODS; by default `default_method`. Occlusion is added as the last if it is not among them.
        layer, head: from 0, for `attention` and `cross_attention`; by default the mean over all heads of all layers.
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
            f"leave them out, or take --method {' or '.join(_BY_LAYER)}",
            kind="conflict",
        )
    forced = TeacherForced(model, processor, conversation, max_new_tokens=max_new_tokens)
    maps = [_map(forced, m, layer, head, grid, patch) for m in [*(c for c in chosen if c != "occlusion"), "occlusion"]]
    log_p_T = forced.log_p(forced.pixels_CHW[None])[0]
    sums = [float(log_p_T[list(w.tokens)].sum()) for w in forced.words]
    width, height = open_image(conversation.images[0].source).size
    return Attribution(forced.text, forced.words, sums, maps, seen_box(processor.image_processor, width, height))


def _map(forced: TeacherForced, method: str, layer: int | None, head: int | None, grid: int, patch: int) -> Map:
    if method == "occlusion":
        drop_THW = occlusion(forced.log_p, forced.pixels_CHW, grid=grid, patch=patch)
        note = f"drop in log-probability (nats); squares of {patch} × {patch} on a grid of {grid} × {grid}"
        return Map(method, _words(drop_THW, forced.words, torch.sum), note)
    if method in _BY_LAYER:
        by_layer = attention_maps.attention if method == "attention" else attention_maps.cross_attention
        weight_TV = by_layer(forced, layer, head).cpu()
    else:
        run: dict[str, Callable[[TeacherForced], Tensor]] = {
            "rollout": attention_maps.attention_rollout, "relevance": attention_maps.relevance,
            "gradient": attention_maps.gradient,
        }  # fmt: skip
        weight_TV = run[method](forced).cpu()
    shape = forced.map_shape(weight_TV.shape[1], encoder=method == "gradient")
    by_word_WHH = _words(weight_TV.unflatten(1, shape), forced.words, torch.mean)
    total_W11 = by_word_WHH.sum((1, 2), keepdims=True)
    # Only of the rows of attention is the rest of the row known to be about something else: the text.
    shares = total_W11.ravel().tolist() if method in ("attention", "rollout") else None
    chosen = (("layer", layer), ("head", head))
    which = [f"mean of all {name}s" if number is None else f"{name} {number}" for name, number in chosen]
    note = f"{_HOW.get(method) or ', '.join(which)}; {shape[0]} × {shape[1]} tokens"
    flat_WHH = np.full_like(
        by_word_WHH, 1 / weight_TV.shape[1]
    )  # nothing on the picture at all: nowhere more than elsewhere
    return Map(method, np.divide(by_word_WHH, total_W11, out=flat_WHH, where=total_W11 > 0), note, shares)


def _words(weight_THW: Tensor, words: Sequence[Word], merge: Callable[..., Tensor]) -> NDArray[np.float32]:
    """Maps of tokens to maps of words: log-probabilities of tokens add up, weights are averaged."""
    merged = [merge(weight_THW[list(w.tokens)].float(), 0) for w in words]
    found: NDArray[np.float32] = torch.stack(merged).cpu().numpy()
    return found


# -- what a model allows, and where a token lies ----------------------------------------------------------------------


def has_places(model: OpticNerveForConditionalGeneration) -> bool:
    """Whether the soft tokens of a picture make a map of it."""
    connector = model.image.connector
    square = isqrt(connector.num_tokens) ** 2 == connector.num_tokens
    return connector.keeps_grid and (square or model.image.encoder.native is not None)


def check_method(model: OpticNerveForConditionalGeneration, method: str) -> None:
    """Refuse what a model's parts do not allow."""
    if method not in METHODS:
        raise OpticNerveError(f"unknown method {method!r}; known: {', '.join(METHODS)}", kind="unknown-name")
    tower, needs = model.image, METHODS[method]
    if method == "gradient":
        count = tower.encoder.num_tokens
        if isqrt(count) ** 2 != count and tower.encoder.native is None:
            raise OpticNerveError(
                f"the encoder gives {count} tokens, which make no square map of the picture (class tokens among "
                "them?); --method occlusion needs no map",
                kind="unsupported",
            )
    if needs == "any":
        return
    if needs == "splice" and not isinstance(tower.fusion, Splice):
        raise OpticNerveError(
            f"{method} reads the language model's attention to soft tokens in the text, and with "
            f"{type(tower.fusion).__name__} there are none in it; take --method cross_attention, gradient or occlusion",
            kind="unsupported",
        )
    if needs == "cross_attention" and not isinstance(tower.fusion, GatedCrossAttention):
        raise OpticNerveError(
            f"this model has no layers of cross-attention (its fusion is {type(tower.fusion).__name__}); "
            "take --method relevance, attention, rollout, gradient or occlusion",
            kind="unsupported",
        )
    if not has_places(model):
        connector, why = tower.connector, "each of its soft tokens gathers from the whole picture"
        if connector.keeps_grid:
            why = f"its {connector.num_tokens} soft tokens make no square"
        raise OpticNerveError(
            f"{method} gives a weight to each soft token, and those of {type(connector).__name__} have no place in the "
            f"picture: {why}; take --method occlusion, or gradient (on the encoder's tokens)",
            kind="unsupported",
        )


def seen_box(image_processor: Any, width: int, height: int) -> Box:
    """Left, top, right, bottom (in pixels) of the part of a picture that the vision encoder's input shows: the
    middle where the processor crops, more than the picture where it pads, the picture itself where it squashes or
    keeps the shape."""
    if getattr(image_processor, "do_pad", False):
        side = float(max(width, height))
    elif getattr(image_processor, "do_center_crop", False):
        shortest = _entry(image_processor.size, "shortest_edge")
        crop = _entry(image_processor.crop_size, "height") or 0
        side = min(width, height) * (crop / shortest if shortest and crop else 1)
    else:
        return 0.0, 0.0, float(width), float(height)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def _entry(size: object, name: str) -> float | None:
    found = size.get(name) if isinstance(size, dict) else getattr(size, name, None)
    return None if found is None else float(found)


# -- occlusion --------------------------------------------------------------------------------------------------------


def occlusion(
    log_p: Callable[[Tensor], Tensor], pixels_CHW: Tensor, *, grid: int = 6, patch: int = 2, batch_size: int = 16
) -> Tensor:
    """How much log-probability each place of a picture is worth to each token of an answer.

    A square of `patch` × `patch` cells, in the picture's mean colour, slides over a map of `grid` × `grid` cells, one
    cell at a time and over the rim, so that every cell is covered equally often. What a cell is worth is the mean drop
    over all squares that cover it.

    Args:
        log_p: pictures (N, C, H, W) → log-probability of each token (N, T).
        pixels_CHW: the picture as the vision encoder gets it.

    Returns: (T, grid, grid), in nats; negative where covering helps the answer.
    """
    height, width = pixels_CHW.shape[1:]
    if not 1 < grid <= min(height, width):
        raise OpticNerveError(
            f"an occlusion grid of {grid} × {grid} does not fit a picture of {height} × {width} pixels: "
            f"2 to {min(height, width)}",
            kind="out-of-range",
        )
    if not 0 < patch < grid:
        raise OpticNerveError(
            f"an occlusion patch is 1 to {grid - 1} cells of the grid of {grid}, not {patch}", kind="out-of-range"
        )
    rows, columns = cell_edges(height, grid), cell_edges(width, grid)
    spans = [slice(max(i, 0), min(i + patch, grid)) for i in range(1 - patch, grid)]
    squares = [(i, j) for i in spans for j in spans]
    colour_C11 = pixels_CHW.mean((1, 2), keepdim=True)
    before_T = log_p(pixels_CHW[None])[0]
    sum_THW = before_T.new_zeros(len(before_T), grid, grid)
    for start in range(0, len(squares), batch_size):
        chosen = squares[start : start + batch_size]
        covered_NCHW = pixels_CHW.repeat(len(chosen), 1, 1, 1)
        for picture_CHW, (i, j) in zip(covered_NCHW, chosen, strict=True):
            picture_CHW[:, rows[i.start] : rows[i.stop], columns[j.start] : columns[j.stop]] = colour_C11
        for (i, j), drop_T in zip(chosen, before_T - log_p(covered_NCHW), strict=True):
            sum_THW[:, i, j] += drop_T[:, None, None]
    return sum_THW / patch**2


def cell_edges(length: int, cells: int) -> list[int]:
    """Where `cells` cells of nearly equal size begin and end: `cells` + 1 pixel numbers."""
    return [round(x) for x in torch.linspace(0, length, cells + 1).tolist()]
