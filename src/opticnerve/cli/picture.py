"""A picture in the terminal: two pixels to a character cell, the upper one its colour, the lower one its background."""

from __future__ import annotations

from typing import Any


def draw(source: Any, *, columns: int = 32) -> Any:
    """The picture as rich text, `columns` characters wide; half as many lines as a square picture has columns.

    `source`: whatever `data.images.open_image` takes.
    """
    from rich.text import Text

    from opticnerve.data.media.open import open_image

    image = open_image(source)
    # An even number of pixel rows, for two share a character.
    rows = max(2, round(columns * image.height / image.width / 2) * 2)
    pixels: Any = image.resize((columns, rows)).load()
    text = Text()
    for y in range(0, rows, 2):
        for x in range(columns):
            text.append("▀", style=f"rgb({_rgb(pixels[x, y])}) on rgb({_rgb(pixels[x, y + 1])})")
        text.append("\n")
    return text


def _rgb(pixel: tuple[int, int, int]) -> str:
    return ",".join(map(str, pixel))
