"""From a printed receipt to a picture of it: faded, crumpled, skewed, photographed on a table.

Every bend of the paper is one smooth map from the paper's pixels to the picture's; the picture is drawn by its inverse
on a grid, and boxes go through the map itself, so that they stay on their words.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch.nn import functional

from opticnerve.starter.receipts.paper import Box

Array = NDArray[np.float64]
Map = Callable[[Array], Array]
"""Points (N, 2), x before y, to points."""

STYLES = ("printed", "faded", "skewed", "crumpled", "photographed")
_GRID = 12


@dataclass(frozen=True)
class Photo:
    """`image`: RGB; `style`: what was done to it; `to_picture`: from the paper's pixels to its own."""

    image: Image.Image
    style: str
    to_picture: Map

    def box(self, box: Box) -> Box:
        """Where a box of the paper lies in the picture: the upright one around it."""
        left, top, right, bottom = box
        middle = (top + bottom) / 2
        xs = [left, right, left, right, left, right]
        found = self.to_picture(np.array(list(zip(xs, [top, top, middle, middle, bottom, bottom], strict=True))))
        (x0, y0), (x1, y1) = found.min(0), found.max(0)
        width, height = self.image.size
        left, top, right, bottom = max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1)
        return round(left, 1), round(top, 1), round(right, 1), round(bottom, 1)


def photograph(rng: random.Random, paper: Image.Image, style: str) -> Photo:
    """Make a picture of a paper (mode L, ink on white) in one of `STYLES`."""
    noise = np.random.default_rng(rng.getrandbits(64))
    ink = 1 - np.asarray(paper, dtype=np.float32) / np.float32(255)
    sheet = _printed(rng, noise, ink, faded=style == "faded" or (style != "printed" and rng.random() < 0.3))
    if style in ("printed", "faded"):
        return Photo(_finish(rng, noise, sheet), style, lambda points: points)
    width, height = paper.size
    margin = rng.randint(4, 12) if style == "skewed" else rng.randint(10, 40)
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=float)
    angle = np.deg2rad(rng.uniform(-4, 4) if style != "photographed" else rng.uniform(-9, 9))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    moved = (corners - corners.mean(0)) @ turn
    if style == "photographed":
        moved += noise.uniform(-0.035, 0.035, (4, 2)) * width
    moved += margin - moved.min(0)
    size = tuple(int(v) for v in np.ceil(moved.max(0) + margin))
    waves = _waves(noise, width, height, rng.uniform(2, 5) if style != "skewed" else 0.0)
    forth, back = _homography(corners, moved), _homography(moved, corners)
    if style != "skewed":
        sheet *= _creases(noise, width, height)[..., None]
    table = _table(rng, noise, (size[0], size[1]))
    picture = _bend(sheet, table, lambda points: _unwave(back(points), waves))
    if style == "photographed":
        picture *= _light(noise, size[0], size[1])[..., None]
    return Photo(_finish(rng, noise, picture), style, lambda points: forth(points + waves(points)))


def _printed(
    rng: random.Random, noise: np.random.Generator, ink: NDArray[np.float32], *, faded: bool
) -> NDArray[np.float32]:
    height, width = ink.shape
    ink = ink ** noise.uniform(0.6, 1.6)  # ink that runs, and ink that dries up
    colour = np.array([1, 1, 1]) - noise.uniform([0, 0, 0], [0.06, 0.08, 0.16])
    tone = np.array(rng.choice([(0.08, 0.08, 0.08), (0.15, 0.15, 0.2), (0.2, 0.15, 0.35), (0.25, 0.25, 0.25)]))
    strength = np.full((height, width), rng.uniform(0.85, 1.0))
    if faded:
        strength *= rng.uniform(0.4, 0.65) * (1 + 0.35 * _smooth(noise, width, height, 6))
        if rng.random() < 0.5:  # a worn print head leaves light stripes down the paper
            strength *= 1 - 0.5 * (noise.random(width) < 0.03)
    alpha = np.clip(ink * strength, 0, 1)[..., None]
    return np.asarray(colour * (1 - alpha) + tone * alpha, dtype=np.float32)


def _smooth(noise: np.random.Generator, width: int, height: int, cells: int) -> NDArray[np.float32]:
    """Noise in [-1, 1] that changes over about a `cells`-th of the longer side."""
    step = max(width, height) / cells
    small = noise.uniform(-1, 1, (max(2, round(height / step) + 1), max(2, round(width / step) + 1)))
    image = Image.fromarray(small.astype(np.float32), "F").resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _waves(noise: np.random.Generator, width: int, height: int, strength: float) -> Map:
    """How far each point of the paper is pushed: a few sine waves, long against a letter."""
    count = 4
    turns = noise.uniform(0, 2 * np.pi, (2, count))
    lengths = noise.uniform(0.5, 1.5, (2, count)) * max(width, height)
    headings = noise.uniform(0, 2 * np.pi, (2, count))
    strengths = noise.uniform(0.2, 1, (2, count)) * strength / 2

    def pushed(points: Array) -> Array:
        along = points[:, 0, None, None] * np.cos(headings) + points[:, 1, None, None] * np.sin(headings)
        return np.asarray((strengths * np.sin(2 * np.pi * along / lengths + turns)).sum(-1))

    return pushed


def _unwave(points: Array, waves: Map) -> Array:
    """The point that was pushed onto each: the pushes are small and smooth, so the fixed point is near at once."""
    found = points
    for _ in range(4):
        found = points - waves(found)
    return found


def _homography(here: Array, there: Array) -> Map:
    rows = []
    for (x, y), (u, v) in zip(here, there, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    matrix = np.append(np.linalg.solve(np.array(rows), there.reshape(-1)), 1).reshape(3, 3)

    def mapped(points: Array) -> Array:
        w = np.c_[points, np.ones(len(points))] @ matrix.T
        return np.asarray(w[:, :2] / w[:, 2:])

    return mapped


def _bend(sheet: NDArray[np.float32], table: NDArray[np.float32], back: Map) -> NDArray[np.float32]:
    """The picture whose every point shows the sheet's point that `back` names, on a table where there is none."""
    height, width = table.shape[:2]
    rows, columns = height // _GRID + 2, width // _GRID + 2
    coarse = np.stack(np.meshgrid(np.linspace(0, width, columns), np.linspace(0, height, rows)), -1)
    source = back(coarse.reshape(-1, 2)).reshape(1, rows, columns, 2) / (sheet.shape[1], sheet.shape[0]) * 2 - 1
    with torch.inference_mode():
        grid = torch.from_numpy(source.astype(np.float32)).permute(0, 3, 1, 2)
        # Grid points lie on pixels' corners, the picture is asked for at their centres.
        fine = functional.interpolate(grid, (2 * height + 1, 2 * width + 1), mode="bilinear", align_corners=True)
        at = fine[:, :, 1::2, 1::2].permute(0, 2, 3, 1)
        layers = torch.from_numpy(np.concatenate([sheet, np.ones_like(sheet[..., :1])], -1)).permute(2, 0, 1)[None]
        bent = functional.grid_sample(layers, at, mode="bicubic", align_corners=False)[0].permute(1, 2, 0).numpy()
    cover = np.clip(bent[..., 3:], 0, 1)
    return np.asarray(bent[..., :3] * cover + table * (1 - cover), dtype=np.float32)


def _creases(noise: np.random.Generator, width: int, height: int) -> NDArray[np.float32]:
    """The shading of a paper that was folded: each fold is a line with a lighter and a darker side."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    shade = np.ones((height, width), dtype=np.float32)
    for _ in range(int(noise.integers(2, 6))):
        angle, strength, reach = noise.uniform(0, np.pi), noise.uniform(0.03, 0.12), noise.uniform(6, 30)
        far = (x - noise.uniform(0, width)) * np.cos(angle) + (y - noise.uniform(0, height)) * np.sin(angle)
        shade += strength * np.tanh(far / 2) * np.exp(-np.abs(far) / reach)
    return shade


def _light(noise: np.random.Generator, width: int, height: int) -> NDArray[np.float32]:
    return np.asarray(0.85 + 0.18 * _smooth(noise, width, height, 2), dtype=np.float32)


def _table(rng: random.Random, noise: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float32]:
    width, height = size
    colour = np.array(rng.choice([(0.45, 0.3, 0.18), (0.25, 0.25, 0.27), (0.6, 0.6, 0.58), (0.2, 0.28, 0.35)]))
    grain = _smooth(noise, width, height, 40) * 0.05 + noise.normal(0, 0.02, (height, width))
    if rng.random() < 0.5:  # wood: rings stretched along the board
        y = np.linspace(0, rng.uniform(20, 60), height)[:, None]
        grain += 0.05 * np.sin(y + 3 * _smooth(noise, width, height, 3))
    return np.asarray(colour + grain[..., None], dtype=np.float32)


def _finish(rng: random.Random, noise: np.random.Generator, picture: NDArray[np.float32]) -> Image.Image:
    grain = noise.normal(0, rng.uniform(0.002, 0.025), picture.shape[:2])[..., None]
    image = Image.fromarray(_bytes(picture + grain))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8))) if rng.random() < 0.5 else image


def _bytes(picture: NDArray[np.floating]) -> NDArray[np.uint8]:
    return np.asarray(np.clip(picture * 255, 0, 255), dtype=np.uint8)
