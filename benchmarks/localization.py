"""Whether a map of where a model looks falls on the object, on drawings whose object can be found by its colour.

easy-VQA shows one shape of one saturated colour on one pale ground, so its place needs no annotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from opticnerve.common.drawing import GREY, INK, figure_of, plain_text, save
from opticnerve.types import OpticNerveError

Mask = NDArray[np.bool_]


def object_mask(picture: PIL.Image.Image) -> Mask:
    """(H, W): where the one object of an easy-VQA drawing is.

    The ground is the commonest colour of the rim; the object, what is further from it than half of the furthest pixel.
    (The edge is blended over a pixel; the half decides it.)

    Raises:
        OpticNerveError: the picture has one colour only.
    """
    pixels_HWC = np.asarray(picture.convert("RGB"), dtype=np.int32)
    rim_NC = np.concatenate([pixels_HWC[0], pixels_HWC[-1], pixels_HWC[:, 0], pixels_HWC[:, -1]])
    colours, counts = np.unique(rim_NC, axis=0, return_counts=True)
    distance_HW = np.linalg.norm(pixels_HWC - colours[counts.argmax()], axis=2)
    furthest = float(distance_HW.max())
    if furthest == 0:
        raise OpticNerveError("the picture has one colour only: there is no object on it", kind="empty")
    found: Mask = distance_HW > furthest / 2
    return found


def enlarge(map_HW: Any, height: int, width: int) -> NDArray[np.float64]:
    """A coarse map as one value a pixel, each pixel that of the cell its middle lies in; non-negative, sum 1.

    Raises:
        OpticNerveError: nothing in the map is above zero, or something is no number.
    """
    coarse = np.asarray(map_HW, dtype=np.float64)
    if coarse.ndim != 2 or not np.isfinite(coarse).all():
        raise OpticNerveError(
            f"a map is a table of finite numbers, not of shape {coarse.shape} with NaN or infinity", kind="wrong-type"
        )
    rows = ((np.arange(height) + 0.5) * coarse.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * coarse.shape[1] / width).astype(int)
    fine = np.clip(coarse, 0, None)[rows][:, columns]
    if fine.sum() == 0:
        raise OpticNerveError("nothing in the map is above zero: it points nowhere", kind="empty")
    normalised: NDArray[np.float64] = fine / fine.sum()
    return normalised


def mass_on_object(map_HW: Any, mask_HW: Mask) -> float:
    """The share of a map on the object: negative values count as zero, the rest is made to sum to 1.

    A map that is the same everywhere scores the object's share of the area, `mask.mean()`: that is chance. A map of
    coarse cells cannot score 1 on an object that fills none of them.
    """
    return float(enlarge(map_HW, *mask_HW.shape)[mask_HW].sum())


def points_at_object(map_HW: Any, mask_HW: Mask) -> float:
    """The pointing game (Zhang et al. 2016, Top-down Neural Attention by Excitation Backprop, section 4.1).

    1 if the highest pixel lies on the object. A cell is many pixels of one height, so the score is the share of the
    highest ones that do.
    """
    fine = enlarge(map_HW, *mask_HW.shape)
    return float(mask_HW[fine >= fine.max() * (1 - 1e-9)].mean())


def best_mass(mask_HW: Mask, rows: int, columns: int) -> float:
    """The highest `mass_on_object` that any map of `rows` × `columns` cells can reach: all on the fullest cell."""
    height, width = mask_HW.shape
    row_of = ((np.arange(height) + 0.5) * rows / height).astype(int)
    column_of = ((np.arange(width) + 0.5) * columns / width).astype(int)
    cell_HW = row_of[:, None] * columns + column_of[None, :]
    covered = np.bincount(cell_HW[mask_HW], minlength=rows * columns)
    area = np.bincount(cell_HW.ravel(), minlength=rows * columns)
    return float((covered / np.maximum(area, 1)).max())


def bootstrap_interval(values: Any, *, seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean over pictures (Efron & Tibshirani 1993, chapter 13)."""
    sample = np.asarray(values, dtype=np.float64)
    if not sample.size:
        raise OpticNerveError("there is nothing to draw from: no values", kind="empty")
    rng = np.random.default_rng(seed)
    means = sample[rng.integers(0, sample.size, (draws, sample.size))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def shares_plot(rows: Sequence[dict[str, Any]], path: Path, *, title: str, note: str) -> Path:
    """Mean share of mass on the object with its interval, by method and model, and what chance would give.

    `rows`: `model`, `method`, `mass`, `low`, `high`, `area`, `best`.
    """
    figure = figure_of(8.4, 1.5 + 0.42 * len(rows))
    axes = figure.subplots()
    places = np.arange(len(rows))[::-1]
    axes.barh(places, [r["mass"] for r in rows], height=0.62, color="#0072B2", zorder=2)
    for y, r in zip(places, rows, strict=True):
        axes.plot([r["low"], r["high"]], [y, y], color=INK, linewidth=1.6, zorder=3)
        axes.text(r["high"] + 0.012, y, f"{r['mass']:.1%}", va="center", fontsize=9, color=INK)
        axes.plot([r["best"]] * 2, [y - 0.36, y + 0.36], color=GREY, linewidth=1.6, linestyle=":", zorder=3)
    axes.axvline(rows[0]["area"], color="#D55E00", linestyle="--", linewidth=1.6, zorder=3)
    axes.set_yticks(places, [f"{r['model']}: {r['method'].replace('_', '-')}" for r in rows], **plain_text())
    axes.set_xlim(0, 1)
    axes.set_xlabel(
        "share of the map on the object\n(dashed: its share of the area; dotted: the most that this grid allows)"
    )
    axes.set_title(f"{title}\n{note}", loc="left", fontsize=10.5, color=INK, **plain_text())
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, axis="y", length=0)
    return save(figure, path)
