"""Opening, measuring and recognising any picture: a file, bytes, a data URL, an opened one, or a frame of a video."""

from __future__ import annotations

import hashlib

import PIL.Image

from opticnerve.common.atomic import sha256
from opticnerve.data.media.images import (
    MAX_PIXELS,
    ON_ITS_SIDE,
    Source,
    locate,
    name_of,
    open_lazily,
    open_picture,
    orientation_of,
    unreadable,
)
from opticnerve.data.media.video import open_frame, picture_of_folder
from opticnerve.types import DataError, Frame


def open_image(
    source: Source, *, where: str = "", max_pixels: int = MAX_PIXELS, at_least: tuple[int, int] | None = None
) -> PIL.Image.Image:
    """A loaded picture of mode RGB, 8 bits a channel, upright: of a picture as `open_picture`, of a video's frame as
    `video.frames`, which also say what the arguments mean and what is raised."""
    if isinstance(source, Frame):
        return open_frame(source, where=where, max_pixels=max_pixels)
    return open_picture(source, where=where, max_pixels=max_pixels, at_least=at_least)


def image_digest(source: Source, *, where: str = "") -> str:
    """SHA-256 of the stored bytes, decoded or not: equal for equal files. For an opened picture, of its pixels; for a
    frame, of its video's bytes and its number."""
    if isinstance(source, PIL.Image.Image):
        return hashlib.sha256(repr((source.mode, source.size)).encode() + source.tobytes()).hexdigest()
    if isinstance(source, Frame):
        if (picture := picture_of_folder(source, where=where)) is not None:
            return image_digest(picture, where=where)
        video = image_digest(source.source, where=where)
        return hashlib.sha256(f"{video} {source.index} {source.of}".encode()).hexdigest()
    name = name_of(source)
    located = locate(source, name, where)
    if isinstance(located, bytes):
        return hashlib.sha256(located).hexdigest()
    try:
        return sha256(located)
    except OSError as e:
        raise unreadable(f"{name} cannot be read: {e.strerror or e}", where) from e


def image_size(source: Source, *, where: str = "") -> tuple[int, int]:
    """Height and width of a picture as `open_image` gives it (upright); of a file only the header is read.

    Raises:
        DataError: as `open_image`, as far as a header shows it.
    """
    if isinstance(source, PIL.Image.Image):
        return source.height, source.width
    if isinstance(source, Frame):
        opened = open_image(source, where=where)
        return opened.height, opened.width
    name = name_of(source)
    try:
        with open_lazily(locate(source, name, where)) as image:
            turned = orientation_of(image) in ON_ITS_SIDE
            return (image.width, image.height) if turned else (image.height, image.width)
    except DataError:
        raise
    except Exception:  # whatever is wrong with it, opening it says so in full
        opened = open_image(source, where=where)
        return opened.height, opened.width
