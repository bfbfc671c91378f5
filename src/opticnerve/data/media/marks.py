"""Boxes and points drawn onto a picture, to look at."""

from __future__ import annotations

from collections.abc import Sequence

import PIL.Image
from PIL import ImageDraw

_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito's, which all can tell apart


def marked(
    image: PIL.Image.Image, marks: Sequence[tuple[float, ...]], labels: Sequence[str] = (), *, frame: int | None = 1000
) -> PIL.Image.Image:
    """A copy with each box (left, top, right, bottom) outlined and each point (x, y) crossed.

    Args:
        frame: into how many parts the numbers divide a side; None: pixels. labels: words beside each, if any.
    """
    drawn = image.convert("RGB")
    if drawn is image:
        drawn = image.copy()
    pen, (width, height) = ImageDraw.Draw(drawn), drawn.size
    thick = max(2, round(min(width, height) / 150))
    for number, mark in enumerate(marks):
        sides = (width, height) * (len(mark) // 2)
        numbers = [n if frame is None else n / frame * side for n, side in zip(mark, sides, strict=True)]
        numbers = [min(max(n, 0.0), side - 1.0) for n, side in zip(numbers, sides, strict=True)]
        colour = _COLOURS[number % len(_COLOURS)]
        x, y = numbers[:2]
        if len(numbers) == 4:
            right, bottom = max(x, numbers[2]), max(y, numbers[3])
            pen.rectangle((x, y, right, bottom), outline=colour, width=thick)
        else:
            reach = 4 * thick
            pen.line((x - reach, y, x + reach, y), fill=colour, width=thick)
            pen.line((x, y - reach, x, y + reach), fill=colour, width=thick)
        if number < len(labels) and labels[number]:
            pen.text((x + thick, max(0.0, y - 12)), labels[number], fill=colour)
    return drawn
